// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ui"
)

// sshHostJSON is a host in "lab ssh-config --json".
type sshHostJSON struct {
	Name           lab.Name `json:"name"`
	Patterns       []string `json:"patterns"` // what ssh may call it
	HostName       string   `json:"hostName"`
	User           string   `json:"user"`
	IdentityFile   string   `json:"identityFile"`
	KnownHostsFile string   `json:"knownHostsFile"`
	HostKeyAlias   string   `json:"hostKeyAlias"`
	ProxyCommand   string   `json:"proxyCommand"`
}

func (a *app) sshConfigCommand() *command {
	return &command{
		name: "ssh-config", group: groupTools, args: "[MACHINE...]", max: -1, lab: true, reports: true,
		short: "print a configuration by which plain ssh reaches the machines",
		long: `With it ssh, scp, sftp, rsync and Ansible reach the machines, as MACHINE.LAB, such as
web.shop, and as MACHINE.LAB-ID, which no machine of another lab is called. --bare
adds the name alone. No port is opened: the connection goes through lab.

With --install it is kept where your ssh finds it: in a file that a line at the top of
~/.ssh/config includes. "lab up" keeps it true, "lab destroy" takes the lab out of it.
A MACHINE.LAB that two installed labs would share is left out of both.`,
		flags: []cli.Flag{
			&cli.BoolFlag{Name: "bare", Usage: "call the machines by their name alone, too"},
			&cli.BoolFlag{Name: "install", Usage: "have your ssh know the machines of this lab"},
			&cli.BoolFlag{Name: "uninstall", Usage: "take this lab out of your ssh's configuration again"},
		},
		complete: a.completeMachines,
		examples: []string{
			"lab ssh-config --install", "from now on, \"ssh web.shop\" logs in",
			"lab ssh-config --bare > ssh.conf", "write it to a file",
			"ssh -F ssh.conf web", "and log in",
			"rsync -e 'ssh -F ssh.conf' a web:/srv/", "or copy",
		},
		run: func(ctx context.Context, r request) error {
			names, err := several(r.args)
			if err != nil {
				return err
			}
			install, remove := r.Bool("install"), r.Bool("uninstall")
			switch {
			case install && remove:
				return usage("say one of them", "--install and --uninstall exclude each other")
			case (install || remove) && (len(names) > 0 || a.asJSON || r.Bool("bare")):
				return usage("leave out everything else", "--install and --uninstall are about the whole lab and print nothing")
			}
			l, err := a.existing(ctx)
			if err != nil {
				return err
			}
			if install || remove {
				return a.keepSSH(ctx, l, install)
			}
			if names, err = l.Expand(names); err != nil {
				return err
			}
			hosts, err := l.SSHConfig()
			if err != nil {
				return err
			}
			if hosts, err = chooseHosts(hosts, names); err != nil {
				return err
			}
			called := sshNames{short: true, bare: r.Bool("bare")}
			if a.asJSON {
				out := []sshHostJSON{}
				for _, h := range hosts {
					out = append(out, sshHostJSON{
						h.Name, called.patterns(l.ID(), h), hostName(l.ID(), h), h.User, h.KeyFile, h.KnownHostsFile, h.HostKeyAlias, a.proxy(l.ID(), h.Name),
					})
				}
				return ui.JSON(a.Out, map[string]any{"hosts": out})
			}
			_, err = io.WriteString(a.Out, a.sshConfig(l.ID(), hosts, called))
			return err
		},
	}
}

// chooseHosts returns the hosts that are named, or all.
func chooseHosts(hosts []engine.SSHHost, names []lab.Name) ([]engine.SSHHost, error) {
	if len(names) == 0 {
		return hosts, nil
	}
	var chosen []engine.SSHHost
	for _, n := range names {
		i := slices.IndexFunc(hosts, func(h engine.SSHHost) bool { return h.Name == n })
		if i < 0 {
			e := &engine.NoMachineError{Name: n}
			for _, h := range hosts {
				e.Known = append(e.Known, h.Name)
			}
			return nil, e
		}
		chosen = append(chosen, hosts[i])
	}
	return chosen, nil
}

// proxy is the command that connects ssh with a machine; ssh gives it to a shell.
func (a *app) proxy(id lab.ID, name lab.Name) string {
	return guest.Quote([]string{a.Program, "ssh-proxy", "--lab", string(id), string(name)})
}

// keepSSH installs the lab for the user's ssh, or takes it out again, and says so.
func (a *app) keepSSH(ctx context.Context, l *engine.Lab, install bool) error {
	h, err := a.host()
	if err != nil {
		return err
	}
	if !install {
		if err := a.uninstallSSH(ctx, h, l.ID()); err != nil {
			return err
		}
		a.ui.Note("your ssh does not know lab %s any more", l.ID())
		return nil
	}
	if err := a.installSSH(ctx, h, l); err != nil {
		return err
	}
	hosts, err := l.SSHConfig()
	if err != nil || len(hosts) == 0 {
		return err
	}
	a.ui.Note("your ssh knows the machines of lab %s: \"ssh %s\" logs in", l.ID(), hostName(l.ID(), hosts[0]))
	return nil
}

// sshNames says what the machines are called besides MACHINE.LAB-ID.
type sshNames struct {
	short bool // MACHINE.LAB
	bare  bool // MACHINE
}

func (n sshNames) patterns(id lab.ID, h engine.SSHHost) []string {
	var all []string
	if n.bare {
		all = append(all, string(h.Name))
	}
	if n.short {
		all = append(all, string(h.Name)+"."+h.Lab)
	}
	return append(all, hostName(id, h))
}

// hostName is the machine's name among those of all labs. A ControlPath is made of it
// (ssh_config(5), %C and %h), so that connections which are shared lead to one machine.
func hostName(id lab.ID, h engine.SSHHost) string { return string(h.Name) + "." + string(id) }

// sshConfig renders hosts as ssh_config(5) has them.
func (a *app) sshConfig(id lab.ID, hosts []engine.SSHHost, called sshNames) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# machines of lab %s, written by \"lab ssh-config\"\n", id)
	for _, h := range hosts {
		fmt.Fprintf(&b, "\nHost %s\n", strings.Join(called.patterns(id, h), " "))
		for _, kv := range [][2]string{
			{"HostName", hostName(id, h)},
			{"CanonicalizeHostname", "no"}, // no name server knows it
			{"User", h.User},
			{"IdentityFile", sshQuote(h.KeyFile)},
			{"IdentitiesOnly", "yes"},
			{"HostKeyAlias", h.HostKeyAlias},
			{"UserKnownHostsFile", sshQuote(h.KnownHostsFile)},
			{"GlobalKnownHostsFile", "/dev/null"},
			{"StrictHostKeyChecking", "yes"},
			{"PreferredAuthentications", "publickey"},
			{"ProxyCommand", strings.ReplaceAll(a.proxy(id, h.Name), "%", "%%")},
		} {
			fmt.Fprintf(&b, "  %s %s\n", kv[0], kv[1])
		}
	}
	return b.String()
}

// sshQuote writes a path as an argument of ssh_config(5), where "%" begins a
// token and double quotes hold spaces.
func sshQuote(path string) string {
	return `"` + strings.ReplaceAll(path, "%", "%%") + `"`
}
