// SPDX-License-Identifier: Apache-2.0

//go:build linux

package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// refusing is a Machine that does nothing, or refuses one thing.
type refusing struct{ what string }

func (m refusing) do(what string) error {
	if m.what == what {
		return errors.New("no " + what)
	}
	return nil
}
func (m refusing) SetHostname(string) error           { return m.do("hostname") }
func (m refusing) SetClock(time.Time) error           { return m.do("clock") }
func (m refusing) AddEntropy([]byte) error            { return m.do("entropy") }
func (m refusing) SetNetwork(agentapi.Identity) error { return m.do("network") }
func (m refusing) GrowRoot() error                    { return m.do("grow") }
func (m refusing) Sync() error                        { return m.do("sync") }
func (m refusing) Shutdown(bool) error                { return m.do("shutdown") }

func identity(t *testing.T) agentapi.Identity {
	t.Helper()
	key, err := os.ReadFile("../testdata/host_key")
	if err != nil {
		t.Fatal(err)
	}
	return agentapi.Identity{
		Hostname: "web-1", Domain: "lab.internal", HostKey: key,
		MAC: "52:54:00:5d:97:0b", Address: netip.MustParsePrefix("10.93.151.11/24"), Gateway: netip.MustParseAddr("10.93.151.1"),
		DNS:            []netip.Addr{netip.MustParseAddr("10.93.151.1")},
		AuthorizedKeys: []string{"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHV64IDRxhY+1xKhUKkKZPdlg6YNaMOj9B0d2dhtBtoM"},
		Users:          []string{"lab", "missing"},
	}
}

// newAgent starts an agent on a root directory that holds files.
func newAgent(t *testing.T, files map[string]string, m Machine) (*Agent, string) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		p := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return restart(t, dir, m), dir
}

func restart(t *testing.T, dir string, m Machine) *Agent {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return &Agent{Version: "test", Root: root, Machine: m, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
}

func passwd() string {
	return fmt.Sprintf("root:x:%d:%d:root:/root:/bin/sh\nlab:x:%[1]d:%[2]d::/home/lab:/bin/sh\nother:x:7:7::/other:/bin/sh\n", os.Getuid(), os.Getgid())
}

func identify(t *testing.T, a *Agent, id agentapi.Identity) *agentapi.Hello {
	t.Helper()
	resp := a.handle(agentapi.Request{Op: agentapi.OpIdentify, Identity: &id})
	if resp.Error != "" {
		t.Fatal(resp.Error)
	}
	return resp.Hello
}

// contents shows files with their modes.
func contents(t *testing.T, dir string, names ...string) string {
	t.Helper()
	var b strings.Builder
	for _, n := range names {
		p := filepath.Join(dir, n)
		fi, err := os.Lstat(p)
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "--- %s %v\n%s", n, fi.Mode(), text)
	}
	return b.String()
}

func TestFiles(t *testing.T) {
	a, dir := newAgent(t, map[string]string{
		"etc/passwd":                    passwd(),
		"etc/hosts":                     "127.0.0.1 localhost\n127.0.1.1 old\n# mine\n10.0.0.1 else",
		"etc/machine-id":                "uninitialized\n",
		"etc/ssh/ssh_host_rsa_key":      "everybody's",
		"etc/ssh/ssh_host_rsa_key.pub":  "everybody's",
		"etc/dropbear/empty":            "",
		"run/stub.conf":                 "nameserver 127.0.0.53\n",
		"home/lab/.ssh/authorized_keys": "ssh-ed25519 AAAA alice\nssh-ed25519 BBBB lab\n",
	}, refusing{})
	if err := os.Symlink("../run/stub.conf", filepath.Join(dir, "etc/resolv.conf")); err != nil {
		t.Fatal(err)
	}
	id := identity(t)
	if h := identify(t, a, id); len(h.Warnings) > 0 {
		t.Errorf("warnings: %q", h.Warnings)
	}
	const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHV64IDRxhY+1xKhUKkKZPdlg6YNaMOj9B0d2dhtBtoM"
	files := []string{
		"etc/hostname", "etc/hosts", "etc/resolv.conf", "run/stub.conf", "root/.ssh/authorized_keys",
		"home/lab/.ssh/authorized_keys", "etc/ssh/ssh_host_ed25519_key", "etc/ssh/ssh_host_ed25519_key.pub",
	}
	want := `--- etc/hostname -rw-r--r--
web-1
--- etc/hosts -rw-r--r--
127.0.0.1 localhost
# mine
10.0.0.1 else
10.93.151.11 web-1.lab.internal web-1 # lab-agent
--- etc/resolv.conf -rw-r--r--
# written by lab-agent
search lab.internal
nameserver 10.93.151.1
--- run/stub.conf -rw-r--r--
nameserver 127.0.0.53
--- root/.ssh/authorized_keys -rw-------
` + key + ` lab
--- home/lab/.ssh/authorized_keys -rw-------
ssh-ed25519 AAAA alice
` + key + ` lab
--- etc/ssh/ssh_host_ed25519_key -rw-------
` + string(id.HostKey) + `--- etc/ssh/ssh_host_ed25519_key.pub -rw-r--r--
` + key + "\n"
	if d := cmp.Diff(want, contents(t, dir, files...)); d != "" {
		t.Errorf("files differ (- want, + got):\n%s", d)
	}
	machineID, err := os.ReadFile(filepath.Join(dir, "etc/machine-id"))
	if err != nil || len(machineID) != 33 || machineID[12] != '4' {
		t.Errorf("machine id %q, %v", machineID, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "etc/ssh/ssh_host_rsa_key")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the box's own host key: %v", err)
	}
	// 4+11 bytes name the kind, 4 say that 64 follow: the seed and the public half.
	bear, err := os.ReadFile(filepath.Join(dir, "etc/dropbear/dropbear_ed25519_host_key"))
	if err != nil || len(bear) != 83 || string(bear[4:15]) != "ssh-ed25519" || binary.BigEndian.Uint32(bear[15:]) != 64 {
		t.Errorf("dropbear's key: %q, %v", bear, err)
	}

	// After a reboot the same is found and nothing changes.
	before, err := os.Stat(filepath.Join(dir, "etc/hosts"))
	if err != nil {
		t.Fatal(err)
	}
	again := restart(t, dir, refusing{})
	if err := again.Restore(); err != nil {
		t.Fatal(err)
	}
	if h := again.handle(agentapi.Request{Op: agentapi.OpHello}).Hello; h.Identity != id.Fingerprint() {
		t.Errorf("identity after a restart: %q, want %q", h.Identity, id.Fingerprint())
	}
	if d := cmp.Diff(want, contents(t, dir, files...)); d != "" {
		t.Errorf("files differ after a restart:\n%s", d)
	}
	if after, err := os.Stat(filepath.Join(dir, "etc/hosts")); err != nil || !os.SameFile(before, after) {
		t.Errorf("a file was written again though it was right: %v", err)
	}
	if got := contents(t, dir, stateFile); !strings.HasPrefix(got, "--- "+stateFile+" -rw-------\n{") || strings.Contains(got, "entropy") {
		t.Errorf("the kept identity: %s", got)
	}
	for name, mode := range map[string]os.FileMode{"var/lib": 0o755, "var/lib/lab-agent": 0o700} {
		if fi, err := os.Stat(filepath.Join(dir, name)); err != nil || fi.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", name, fi.Mode(), err)
		}
	}

	// Another identity replaces what was ours and nothing else.
	id.Hostname, id.Address, id.AuthorizedKeys = "db", netip.MustParsePrefix("10.93.151.12/24"), []string{key + " new"}
	identify(t, again, id)
	got := contents(t, dir, "etc/hosts", "home/lab/.ssh/authorized_keys")
	want = `--- etc/hosts -rw-r--r--
127.0.0.1 localhost
# mine
10.0.0.1 else
10.93.151.12 db.lab.internal db # lab-agent
--- home/lab/.ssh/authorized_keys -rw-------
ssh-ed25519 AAAA alice
` + key + " lab\n"
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("files differ for another identity:\n%s", d)
	}
}

// A user cannot have root write, or read, elsewhere than in the user's own .ssh.
func TestAuthorizeFollowsNoLinks(t *testing.T) {
	for name, c := range map[string]struct {
		plant func(home string) error
		want  string
	}{
		"directory": {
			func(home string) error {
				return errors.Join(os.Mkdir(filepath.Join(home, "elsewhere"), 0o700), os.Symlink("elsewhere", filepath.Join(home, ".ssh")))
			}, `authorizing keys for user "lab": /home/lab/.ssh is not a directory, and links are not followed`,
		},
		"file": {
			func(home string) error {
				return errors.Join(os.Mkdir(filepath.Join(home, ".ssh"), 0o700), os.Symlink("../secret", filepath.Join(home, ".ssh/authorized_keys")))
			}, `authorizing keys for user "lab": authorized_keys is a link or no regular file, and is left alone`,
		},
		"hard link": {
			func(home string) error {
				return errors.Join(os.Mkdir(filepath.Join(home, ".ssh"), 0o700), os.Link(filepath.Join(home, "secret"), filepath.Join(home, ".ssh/authorized_keys")))
			}, `authorizing keys for user "lab": authorized_keys is a link or no regular file, and is left alone`,
		},
		"pipe": {
			func(home string) error {
				return errors.Join(os.Mkdir(filepath.Join(home, ".ssh"), 0o700), syscall.Mkfifo(filepath.Join(home, ".ssh/authorized_keys"), 0o600))
			}, `authorizing keys for user "lab": authorized_keys is a link or no regular file, and is left alone`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, dir := newAgent(t, map[string]string{"etc/passwd": passwd(), "home/lab/secret": "secret"}, refusing{})
			home := filepath.Join(dir, "home/lab")
			if err := c.plant(home); err != nil {
				t.Fatal(err)
			}
			if h := identify(t, a, identity(t)); !slices.Contains(h.Warnings, c.want) {
				t.Errorf("warnings: %q, want %s", h.Warnings, c.want)
			}
			if left, err := os.ReadDir(filepath.Join(home, "elsewhere")); len(left) > 0 {
				t.Errorf("behind the link: %v, %v", left, err)
			}
			if text, err := os.ReadFile(filepath.Join(home, "secret")); string(text) != "secret" {
				t.Errorf("the other file holds %q, %v", text, err)
			}
		})
	}
}

func TestEmptyRoot(t *testing.T) {
	// The agent is to work in any Linux: nothing needs to be there.
	a, dir := newAgent(t, nil, refusing{})
	if h := identify(t, a, identity(t)); len(h.Warnings) != 3 {
		t.Errorf("warnings: %q, want one per user", h.Warnings)
	}
	want := "--- etc/hosts -rw-r--r--\n127.0.0.1 localhost # lab-agent\n10.93.151.11 web-1.lab.internal web-1 # lab-agent\n"
	if got := contents(t, dir, "etc/hosts"); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestRefusals(t *testing.T) {
	id := identity(t)
	id.Time, id.Entropy = time.Now(), []byte("x")
	for what, want := range map[string]string{
		"hostname": "setting the host name: no hostname",
		"network":  "setting up the network: no network",
		"clock":    "no clock",
		"entropy":  "no entropy",
	} {
		a, dir := newAgent(t, map[string]string{"etc/passwd": passwd()}, refusing{what})
		resp := a.handle(agentapi.Request{Op: agentapi.OpIdentify, Identity: &id})
		if resp.Error != want || resp.Hello != nil {
			t.Errorf("%s: got %+v, want %s", what, resp, want)
		}
		if _, err := os.Stat(filepath.Join(dir, stateFile)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: an identity that was not applied was kept: %v", what, err)
		}
	}
	a, _ := newAgent(t, map[string]string{"etc/passwd": passwd()}, refusing{"grow"})
	if h := identify(t, a, id); len(h.Warnings) != 1 || h.Warnings[0] != "growing the root file system: no grow" {
		t.Errorf("warnings: %q", h.Warnings)
	}
	if got := a.handle(agentapi.Request{Op: "dance"}).Error; got != "lab-agent test knows no such request" {
		t.Errorf("unknown request: %s", got)
	}
	if got := a.handle(agentapi.Request{Op: agentapi.OpIdentify}).Error; got != "no identity was given" {
		t.Errorf("no identity: %s", got)
	}
}

func TestRestoreDamaged(t *testing.T) {
	a, _ := newAgent(t, map[string]string{stateFile: "{\"hostna"}, refusing{})
	err := a.Restore()
	if want := "reading the kept identity: unexpected end of JSON input"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	// It is no obstacle to the next one.
	id := identity(t)
	if h := identify(t, a, id); h.Identity != id.Fingerprint() {
		t.Errorf("identity %q", h.Identity)
	}
}

func TestFindPort(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"sys/class/virtio-ports/vport1p1/name": "org.qemu.guest_agent.0\n",
		"sys/class/virtio-ports/vport2p1/name": agentapi.Port + "\n",
	} {
		p := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := findPort(dir, agentapi.Port); err != nil || got != filepath.Join(dir, "dev/vport2p1") {
		t.Errorf("without udev: %q, %v", got, err)
	}
	link := filepath.Join(dir, "dev/virtio-ports", agentapi.Port)
	if err := errors.Join(os.MkdirAll(filepath.Dir(link), 0o755), os.WriteFile(link, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	if got, err := findPort(dir, agentapi.Port); err != nil || got != link {
		t.Errorf("with udev: %q, %v", got, err)
	}
	if _, err := findPort(dir, "no.such"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no such port: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	_, err := OpenPort(ctx, "no.such.port.in.this.machine")
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("waiting for a port: %v", err)
	}
}

func TestExt4Blocks(t *testing.T) {
	sb := make([]byte, 1024)
	if _, _, err := ext4Blocks(sb); err == nil {
		t.Error("zeros were taken for a superblock")
	}
	le := binary.LittleEndian
	le.PutUint16(sb[0x38:], 0xef53)
	le.PutUint32(sb[0x4:], 262144)
	le.PutUint32(sb[0x18:], 2)
	le.PutUint32(sb[0x150:], 1)
	if blocks, size, err := ext4Blocks(sb); err != nil || blocks != 262144 || size != 4096 {
		t.Errorf("got %d blocks of %d bytes, %v", blocks, size, err)
	}
	le.PutUint32(sb[0x60:], 0x80)
	if blocks, _, err := ext4Blocks(sb); err != nil || blocks != 1<<32+262144 {
		t.Errorf("64 bit: got %d blocks, %v", blocks, err)
	}
}

func FuzzExt4Blocks(f *testing.F) {
	f.Add(bytes.Repeat([]byte{0xef, 0x53}, 512))
	f.Fuzz(func(t *testing.T, b []byte) {
		sb := make([]byte, 1024)
		copy(sb, b)
		if _, size, err := ext4Blocks(sb); err == nil && size == 0 {
			t.Error("blocks of no size")
		}
	})
}
