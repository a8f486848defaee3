// SPDX-License-Identifier: Apache-2.0

package cli

// Headings of the overview.
const (
	groupDaily = "Every day"
	groupLook  = "A closer look"
	groupKeep  = "Boxes and upkeep"
	groupTools = "For other tools"
)

// commands returns the tree of all commands, in the order of the overview.
func (a *app) commands() *command {
	root := &command{
		name:  "lab",
		short: "disposable virtual machines, declared in a Labfile",
		long: `A Labfile says which machines there are; "lab up" makes it so. A machine is born
from an immutable box and never repaired: "lab replace" gives you a new one.
Nothing needs root, and nothing runs when nothing is up.

Exit codes: 0 done, 1 failed, 2 differences found, 3 bad usage, Labfile or lock
file, 4 the lab is locked, 5 this host cannot do it, 130 interrupted. "exec" and
"ssh" pass on that of the command.`,
		examples: []string{
			"lab init", "write a Labfile to start from",
			"lab up", "boot its machines and wait until they are ready",
			"lab ssh web", "log in to one of them",
			"lab destroy", "remove them all",
		},
		subs: []*command{
			a.initCommand(), a.upCommand(), a.statusCommand(), a.sshCommand(), a.execCommand(), a.cpCommand(),
			a.logsCommand(), a.stopCommand(), a.startCommand(), a.restartCommand(), a.replaceCommand(), a.rollbackCommand(), a.destroyCommand(),
			a.planCommand(), a.diffCommand(), a.verifyCommand(), a.validateCommand(), a.listCommand(), a.historyCommand(), a.showCommand(), a.consoleCommand(), a.doctorCommand(),
			a.taintCommand(), a.untaintCommand(), a.burnCommand(),
			a.bakeCommand(), a.volumeCommand(), a.boxCommand(), a.lockCommand(), a.gcCommand(),
			a.adoptCommand(), a.sshConfigCommand(), a.schemaCommand(), a.completionCommand(), a.versionCommand(),
			a.sshProxyCommand(), a.superviseCommand(), a.tendCommand(), a.completeCommand(),
		},
	}
	root.adopt()
	return root
}

func (c *command) adopt() {
	for _, s := range c.subs {
		s.parent = c
		s.adopt()
	}
}
