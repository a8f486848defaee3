// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ui"
)

// sshHostJSON is a host in "lab ssh-config --json".
type sshHostJSON struct {
	Name           lab.Name `json:"name"`
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
		long: `With it ssh, scp, sftp, rsync and Ansible reach the machines by their names. Each
is also called NAME.LAB-ID, for configurations that hold several labs. No port is
opened: the connection goes through lab.`,
		complete: a.completeMachines,
		examples: []string{
			"lab ssh-config > ssh.conf", "write it to a file",
			"ssh -F ssh.conf web", "and log in",
			"rsync -e 'ssh -F ssh.conf' a web:/srv/", "or copy",
		},
		run: func(ctx context.Context, r request) error {
			names, err := several(r.args)
			if err != nil {
				return err
			}
			l, err := a.existing(ctx)
			if err != nil {
				return err
			}
			hosts, err := l.SSHConfig()
			if err != nil {
				return err
			}
			if hosts, err = chooseHosts(hosts, names); err != nil {
				return err
			}
			if a.asJSON {
				out := []sshHostJSON{}
				for _, h := range hosts {
					out = append(out, sshHostJSON{h.Name, h.User, h.KeyFile, h.KnownHostsFile, h.HostKeyAlias, a.proxy(l.ID(), h.Name)})
				}
				return ui.JSON(a.Out, map[string]any{"hosts": out})
			}
			_, err = io.WriteString(a.Out, a.sshConfig(l.ID(), hosts))
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

// sshConfig renders hosts as ssh_config(5) has them.
func (a *app) sshConfig(id lab.ID, hosts []engine.SSHHost) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# machines of lab %s, written by \"lab ssh-config\"\n", id)
	for _, h := range hosts {
		fmt.Fprintf(&b, "\nHost %s %s.%s\n", h.Name, h.Name, id)
		for _, kv := range [][2]string{
			{"HostName", string(h.Name)},
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
