// SPDX-License-Identifier: Apache-2.0

//go:build linux

package agent

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// files writes the files that carry an identity.
func (a *Agent) files(id agentapi.Identity, host ssh.Signer, warn func(string, error)) error {
	if err := a.mkdir("etc", 0o755); err != nil {
		return err
	}
	if err := a.write("etc/hostname", []byte(id.Hostname+"\n"), 0o644); err != nil {
		return err
	}
	warn("writing /etc/hosts", a.hosts(id))
	if len(id.DNS) > 0 {
		warn("writing /etc/resolv.conf", a.resolv(id))
	}
	warn("making a machine id", a.machineID())
	users := append([]string{"root"}, id.Users...)
	for _, u := range users {
		// Only the guest's own ssh server reads these: ours knows the keys.
		warn(fmt.Sprintf("authorizing keys for user %q", u), a.authorize(u, id.AuthorizedKeys))
	}
	// The host key comes last: an ssh server may be waiting for it.
	return a.hostKey(id, host, warn)
}

// The lines of /etc/hosts that are ours end in this comment.
const ours = "# lab-agent"

// hosts gives the machine's own name its own address.
func (a *Agent) hosts(id agentapi.Identity) error {
	old, err := a.Root.ReadFile("etc/hosts")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var b strings.Builder
	local := false
	for line := range strings.Lines(string(old)) {
		line = strings.TrimRight(line, "\n")
		// Debian gives the host name to 127.0.1.1; that of the box is not ours.
		if strings.HasSuffix(line, ours) || strings.HasPrefix(line, "127.0.1.1") {
			continue
		}
		local = local || slices.Contains(strings.Fields(line), "localhost")
		b.WriteString(line + "\n")
	}
	if !local {
		b.WriteString("127.0.0.1 localhost " + ours + "\n")
	}
	addr := "127.0.1.1"
	if id.Address.IsValid() {
		addr = id.Address.Addr().String()
	}
	names := id.Hostname
	if id.Domain != "" {
		names = id.Hostname + "." + id.Domain + " " + names
	}
	b.WriteString(addr + " " + names + " " + ours + "\n")
	return a.write("etc/hosts", []byte(b.String()), 0o644)
}

// resolv names the name servers. A symbolic link is replaced: whatever manages its
// target does not know of them.
func (a *Agent) resolv(id agentapi.Identity) error {
	var b strings.Builder
	b.WriteString("# written by lab-agent\n")
	if id.Domain != "" {
		b.WriteString("search " + id.Domain + "\n")
	}
	for _, d := range id.DNS {
		b.WriteString("nameserver " + d.String() + "\n")
	}
	return a.write("etc/resolv.conf", []byte(b.String()), 0o644)
}

// machineID makes an id of machine-id(5) if there is none. One that systemd made at
// this boot is left alone.
func (a *Agent) machineID() error {
	old, err := a.Root.ReadFile("etc/machine-id")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if s := strings.TrimSpace(string(old)); s != "" && s != "uninitialized" {
		return nil
	}
	id := make([]byte, 16)
	_, _ = rand.Read(id)
	id[6] = id[6]&0x0f | 0x40 // a version 4 UUID, as systemd makes it
	id[8] = id[8]&0x3f | 0x80
	return a.write("etc/machine-id", []byte(hex.EncodeToString(id)+"\n"), 0o444)
}

// The comment of keys that are ours. Others in the file stay.
const keyComment = "lab"

// authorize lets the keys log in as user over the guest's own ssh server. It passes
// over a user the guest does not have.
func (a *Agent) authorize(user string, keys []string) error {
	passwd, err := a.Root.ReadFile("etc/passwd")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(passwd)) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) < 7 || f[0] != user {
			continue
		}
		uid, err1 := strconv.Atoi(f[2])
		gid, err2 := strconv.Atoi(f[3])
		home := strings.Trim(path.Clean(f[5]), "/")
		if err := errors.Join(err1, err2); err != nil || home == "" {
			return err
		}
		dir, file := path.Join(home, ".ssh"), path.Join(home, ".ssh/authorized_keys")
		if err := a.mkdir(dir, 0o700); err != nil {
			return err
		}
		old, err := a.Root.ReadFile(file)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		var b strings.Builder
		for line := range strings.Lines(string(old)) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasSuffix(line, " "+keyComment) {
				b.WriteString(line + "\n")
			}
		}
		for _, k := range keys {
			f := strings.Fields(k)
			b.WriteString(strings.Join(f[:min(2, len(f))], " ") + " " + keyComment + "\n")
		}
		if err := a.write(file, []byte(b.String()), 0o600); err != nil {
			return err
		}
		if os.Getuid() != 0 {
			return nil
		}
		return errors.Join(a.Root.Lchown(dir, uid, gid), a.Root.Lchown(file, uid, gid))
	}
	return nil
}

// hostKey hands the host key to the guest's own ssh server: where OpenSSH and
// dropbear look for it. Keys that the box brought are removed: they are everybody's.
func (a *Agent) hostKey(id agentapi.Identity, host ssh.Signer, warn func(string, error)) error {
	const openssh = "etc/ssh/ssh_host_ed25519_key"
	if err := a.mkdir("etc/ssh", 0o755); err != nil {
		return err
	}
	for _, kind := range []string{"rsa", "dsa", "ecdsa"} {
		for _, suffix := range []string{"", ".pub"} {
			if err := a.Root.Remove("etc/ssh/ssh_host_" + kind + "_key" + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
				warn("removing a host key of the box", err)
			}
		}
	}
	if err := a.write(openssh+".pub", ssh.MarshalAuthorizedKey(host.PublicKey()), 0o644); err != nil {
		return err
	}
	if err := a.write(openssh, id.HostKey, 0o600); err != nil {
		return err
	}
	if _, err := a.Root.Stat("etc/dropbear"); err != nil {
		return nil
	}
	private, err := ssh.ParseRawPrivateKey(id.HostKey)
	if err != nil {
		return err
	}
	key, ok := private.(*ed25519.PrivateKey)
	if !ok {
		return errors.New("the host key is not an ed25519 key")
	}
	return a.write("etc/dropbear/dropbear_ed25519_host_key", dropbearKey(*key), 0o600)
}

// dropbearKey writes a private key the way dropbear keeps it: the name of its kind,
// then both halves in one string.
func dropbearKey(key ed25519.PrivateKey) []byte {
	return ssh.Marshal(struct {
		Kind string
		Key  []byte
	}{ssh.KeyAlgoED25519, key})
}

func (a *Agent) mkdir(name string, mode fs.FileMode) error {
	if fi, err := a.Root.Stat(name); err == nil && fi.IsDir() {
		return nil
	}
	if err := a.Root.MkdirAll(name, mode); err != nil {
		return fmt.Errorf("making /%s: %w", name, err)
	}
	return nil
}

// write replaces a file as a whole, unless it already is what it should be. It does
// not wait for the disk, which is slow under emulation: what a crash takes away, the
// host hands over again.
func (a *Agent) write(name string, data []byte, mode fs.FileMode) error {
	if fi, err := a.Root.Lstat(name); err == nil && fi.Mode() == mode {
		if old, err := a.Root.ReadFile(name); err == nil && bytes.Equal(old, data) {
			return nil
		}
	}
	tmp := name + ".lab-new"
	err := a.Root.Remove(tmp)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("writing /%s: %w", name, err)
	}
	f, err := a.Root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err == nil {
		_, err = f.Write(data)
		err = errors.Join(err, f.Chmod(mode), f.Close())
	}
	if err == nil {
		err = a.Root.Rename(tmp, name)
	}
	if err != nil {
		return fmt.Errorf("writing /%s: %w", name, err)
	}
	return nil
}
