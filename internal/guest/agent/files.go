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
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

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
		if err := a.mkdir(home, 0o700); err != nil {
			return err
		}
		dir, err := a.sshDir(home, owner{uid, gid})
		if err != nil {
			return err
		}
		defer dir.Close()
		return addKeys(dir, keys, owner{uid, gid})
	}
	return nil
}

// owner is whom a file is given to.
type owner struct{ uid, gid int }

// give makes f its owner's. Only root can do that, so nobody else tries.
func (o owner) give(f *os.File) error {
	if os.Getuid() != 0 {
		return nil
	}
	return f.Chown(o.uid, o.gid)
}

// sshDir opens the directory .ssh in home, which it makes if need be. The user may
// have put anything there and may change it at any time, so a link is refused, and
// what was looked at is what is opened.
func (a *Agent) sshDir(home string, o owner) (*os.Root, error) {
	const name = ".ssh"
	full := "/" + path.Join(home, name)
	in, err := a.Root.OpenRoot(home)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	if err := in.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("making %s: %w", full, err)
	}
	seen, err := in.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !seen.IsDir() {
		return nil, fmt.Errorf("%s is not a directory, and links are not followed", full)
	}
	dir, err := in.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	self, err := dir.Open(".")
	if err != nil {
		dir.Close()
		return nil, err
	}
	defer self.Close()
	opened, err := self.Stat()
	if err == nil && !os.SameFile(seen, opened) {
		err = fmt.Errorf("%s was replaced meanwhile", full)
	}
	if err == nil {
		err = o.give(self)
	}
	if err != nil {
		dir.Close()
		return nil, err
	}
	return dir, nil
}

// addKeys replaces our keys in the file authorized_keys of dir.
func addKeys(dir *os.Root, keys []string, o owner) error {
	const file = "authorized_keys"
	old, err := readOwn(dir, file)
	if err != nil {
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
	if err := write(dir, file, []byte(b.String()), 0o600, o.give); err != nil {
		return fmt.Errorf("writing %s: %w", file, err)
	}
	return nil
}

// readOwn reads a file that a user may have put there; no file is an empty one. It
// refuses links of both kinds, by which a user could read what only root may, and
// whatever root would wait at.
func readOwn(dir *os.Root, name string) ([]byte, error) {
	fi, err := dir.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f, err := dir.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err == nil {
		defer f.Close()
		var opened fs.FileInfo
		if opened, err = f.Stat(); err == nil {
			st, ok := opened.Sys().(*syscall.Stat_t)
			if fi.Mode().IsRegular() && os.SameFile(fi, opened) && ok && st.Nlink == 1 {
				return io.ReadAll(f)
			}
		}
	}
	if err == nil || fi.Mode()&fs.ModeSymlink != 0 {
		err = fmt.Errorf("%s is a link or no regular file, and is left alone", name)
	}
	return nil, err
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

// mkdir makes a folder of the guest with the mode, and what is missing above it with 0755.
func (a *Agent) mkdir(name string, mode fs.FileMode) error {
	if fi, err := a.Root.Stat(name); err == nil && fi.IsDir() {
		return nil
	}
	err := a.Root.MkdirAll(path.Dir(name), 0o755)
	if err == nil {
		err = a.Root.Mkdir(name, mode)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("making /%s: %w", name, err)
	}
	return nil
}

// write is the function write for a file of the guest.
func (a *Agent) write(name string, data []byte, mode fs.FileMode) error {
	if err := write(a.Root, name, data, mode, nil); err != nil {
		return fmt.Errorf("writing /%s: %w", name, err)
	}
	return nil
}

// write replaces a file as a whole, unless it already is what it should be. It does
// not wait for the disk, which is slow under emulation: what a crash takes away, the
// host hands over again. give, if not nil, is called with the file before others can
// see it under its name.
func write(root *os.Root, name string, data []byte, mode fs.FileMode, give func(*os.File) error) error {
	if fi, err := root.Lstat(name); err == nil && fi.Mode() == mode {
		if old, err := root.ReadFile(name); err == nil && bytes.Equal(old, data) {
			return nil
		}
	}
	tmp := name + ".lab-new"
	err := root.Remove(tmp)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err == nil {
		if give != nil {
			err = give(f)
		}
		if err == nil {
			_, err = f.Write(data)
		}
		err = errors.Join(err, f.Chmod(mode), f.Close())
	}
	if err == nil {
		err = root.Rename(tmp, name)
	}
	return err
}
