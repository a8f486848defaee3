// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// account is somebody whom lab runs as. Each test has a world of the account's to itself, so
// that tests can run at the same time.
type account struct {
	name  string              // "root" or "user"
	cred  *syscall.Credential // nil for the user of the tests
	bases string              // where the worlds have their base
	runs  string              // and their XDG_RUNTIME_DIR

	// Stores with builtin/tiny, and with builtin/debian-12 as well; filled when they are
	// first asked for.
	tiny, both func() (string, error)

	mu    sync.Mutex
	made  int    // worlds
	accel []byte // what the worlds have found out about this host, if they have
}

// accounts are whom every test runs as: root and an ordinary user; only the latter if
// the tests do not run as root.
var accounts []*account

// newAccount makes an account whose boxes are copies of those of another, if there is
// one.
func newAccount(name, bases, runs string, cred *syscall.Credential, from *account) *account {
	a := &account{name: name, cred: cred, bases: bases, runs: runs}
	dir := os.Getenv("LAB_E2E_BOXES") // a store to copy, for the impatient developer
	a.tiny = sync.OnceValues(func() (string, error) {
		switch {
		case dir != "":
			return a.copied(dir, nil)
		case from != nil:
			return a.copied(from.tiny())
		}
		return a.built("builtin/tiny", "")
	})
	a.both = sync.OnceValues(func() (string, error) {
		switch {
		case dir != "":
			return a.tiny()
		case from != nil:
			return a.copied(from.both())
		}
		tiny, err := a.tiny()
		if err != nil {
			return "", err
		}
		return a.built("builtin/debian-12", tiny)
	})
	return a
}

// own gives a file or folder to the user.
func (a *account) own(path string) error {
	if a.cred == nil {
		return nil
	}
	return filepath.WalkDir(path, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, int(a.cred.Uid), int(a.cred.Gid))
	})
}

// uid is the user that lab runs as.
func (a *account) uid() int {
	if a.cred == nil {
		return os.Getuid()
	}
	return int(a.cred.Uid)
}

const userPrefix = "lab-e2e-"

// makeUser adds an account without any right of its own, and returns what
// removes it.
func makeUser() (*syscall.Credential, func() error, error) {
	if err := removeStaleUsers(); err != nil {
		return nil, nil, err
	}
	name := userPrefix + strconv.Itoa(os.Getpid())
	if err := admin("useradd", "--no-create-home", "--shell", "/bin/sh", name); err != nil {
		return nil, nil, err
	}
	forget := func() error { return admin("userdel", name) }
	// useradd gives subordinate ids on most hosts, but not on all.
	for _, kind := range []string{"uids", "gids"} {
		b, err := os.ReadFile("/etc/sub" + strings.TrimSuffix(kind, "s"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, nil, errors.Join(err, forget())
		}
		if strings.Contains("\n"+string(b), "\n"+name+":") {
			continue
		}
		if err := admin("usermod", "--add-sub"+kind, "1000000000-1000065535", name); err != nil {
			return nil, nil, errors.Join(err, forget())
		}
	}
	u, err := user.Lookup(name)
	if err != nil {
		return nil, nil, errors.Join(err, forget())
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		return nil, nil, errors.Join(err, forget())
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, forget, nil
}

// removeStaleUsers removes the accounts of test runs that were killed.
func removeStaleUsers() error {
	b, err := os.ReadFile("/etc/passwd")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		name, _, _ := strings.Cut(line, ":")
		pid, ours := strings.CutPrefix(name, userPrefix)
		if !ours {
			continue
		}
		if _, err := os.Stat("/proc/" + pid); errors.Is(err, fs.ErrNotExist) {
			if err := admin("userdel", name); err != nil {
				return err
			}
		}
	}
	return nil
}

func admin(name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if path, err := exec.LookPath("/usr/sbin/" + name); err == nil {
		cmd.Path, cmd.Err = path, nil
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}
