// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/libvirt/daemontest"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/providertest"
)

func TestMain(m *testing.M) {
	daemontest.Main()
	os.Exit(m.Run())
}

// testDirs returns empty directories, with a runtime directory whose path is
// short enough for sockets.
func testDirs(t *testing.T) dirs.Dirs {
	t.Helper()
	run, err := os.MkdirTemp("/tmp", "labl-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })
	tmp := t.TempDir()
	return dirs.Dirs{Data: filepath.Join(tmp, "data, with comma & <more>"), Run: run, Cache: filepath.Join(tmp, "cache")}
}

// testProvider returns a provider as a process of its own would have it.
func testProvider(t *testing.T, d *daemontest.Daemon, dirs dirs.Dirs) *Provider {
	p, ok := New(Config{Dirs: dirs, URI: d.URI(), Accel: "tcg", Getenv: d.Getenv}).(*Provider)
	if !ok {
		t.Fatalf("the daemon at %s is one of another host", d.URI())
	}
	if !p.addr.session {
		p.logs = d.Logs()
	}
	t.Cleanup(p.Close)
	return p
}

func leftovers(t *testing.T, d dirs.Dirs, daemon *daemontest.Daemon) []string {
	t.Helper()
	found := append(providertest.Hypervisors(t, filepath.Base(d.Run)), daemon.Leftovers(t)...)
	for _, root := range []string{d.Labs(), d.Run} {
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err != nil && !local.Gone(err) {
				return err
			}
			if err == nil && path != root && !(e.IsDir() && filepath.Dir(path) == root && root == d.Labs()) {
				found = append(found, path)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return found
}

func TestConformance(t *testing.T) {
	t.Parallel()
	conform(t, daemontest.Start(t))
}

// conform puts providers of the daemon to the suite.
func conform(t *testing.T, daemon *daemontest.Daemon) {
	providertest.Run(t, func(t *testing.T) providertest.Host {
		d := testDirs(t)
		p := testProvider(t, daemon, d)
		send := func(s syscall.Signal) func(*testing.T, providers.Machine) {
			return func(t *testing.T, m providers.Machine) {
				if err := syscall.Kill(m.PID, s); err != nil {
					t.Fatal(err)
				}
			}
		}
		undefine := func(t *testing.T, g lab.Generation) {
			dom, ok, err := p.find(t.Context(), g)
			if err != nil || !ok {
				t.Fatal(ok, err)
			}
			err = p.link.do(t.Context(), func(l *golibvirt.Libvirt) error { return l.DomainUndefine(dom.Domain) })
			if err != nil {
				t.Fatal(err)
			}
		}
		return providertest.Host{
			Provider: p, Other: testProvider(t, daemon, d),
			Image: providertest.BootImage(t, false), Deaf: providertest.BootImage(t, true), Memory: 16 * lab.MiB,
			Kill: send(syscall.SIGKILL),
			Freeze: func(t *testing.T, m providers.Machine) {
				send(syscall.SIGSTOP)(t, m)
				for !local.Halted(m.PID) { // the signal takes its time
					time.Sleep(time.Millisecond)
				}
			},
			Pause: func(t *testing.T, m providers.Machine) {
				dom, ok, err := p.find(t.Context(), m.Generation)
				if err != nil || !ok {
					t.Fatal(ok, err)
				}
				err = p.link.do(t.Context(), func(l *golibvirt.Libvirt) error { return l.DomainSuspend(dom.Domain) })
				if err != nil {
					t.Fatal(err)
				}
			},
			Isolate: func(t *testing.T, m providers.Machine) {
				if err := os.RemoveAll(d.RunLab(m.Lab)); err != nil {
					t.Fatal(err)
				}
			},
			Halve: func(t *testing.T, g lab.Generation) {
				undefine(t, g)
				if err := os.Truncate(local.OverlayPath(p.dir(g), 0), 100); err != nil {
					t.Fatal(err)
				}
			},
			HalveDestroy: func(t *testing.T, g lab.Generation) {
				undefine(t, g)
				p.removeLog(domainName(g))
				if err := local.Discard(p.dir(g)); err != nil {
					t.Fatal(err)
				}
			},
			ReadDisk:  providertest.ReadDisk,
			Leftovers: func(t *testing.T) []string { return leftovers(t, d, daemon) },
		}
	})
}
