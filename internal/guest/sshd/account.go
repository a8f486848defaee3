// SPDX-License-Identifier: Apache-2.0

//go:build linux

package sshd

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// account is a line of passwd(5), with the groups of group(5).
type account struct {
	name   string
	uid    uint32
	gid    uint32
	groups []uint32
	home   string
	shell  string
}

func (c Config) account(name string) (account, error) {
	return lookup(c.etc(), name)
}

// etc is the directory of passwd.
func (c Config) etc() string {
	if c.Etc == "" {
		return "/etc"
	}
	return c.Etc
}

// lookup finds an account in the files below etc. Directory services are not asked:
// a disposable machine has its users in files.
func lookup(etc, name string) (account, error) {
	var acc account
	found := false
	err := eachLine(filepath.Join(etc, "passwd"), 7, func(f []string) bool {
		if f[0] != name {
			return true
		}
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err1 != nil || err2 != nil {
			return true
		}
		acc = account{name: name, uid: uint32(uid), gid: uint32(gid), home: f[5], shell: f[6]}
		found = true
		return false
	})
	if err != nil {
		return account{}, fmt.Errorf("looking up user %q: %w", name, err)
	}
	if !found {
		return account{}, fmt.Errorf("no such user: %q", name)
	}
	if acc.home == "" {
		acc.home = "/"
	}
	if acc.shell == "" {
		acc.shell = "/bin/sh"
	}
	acc.groups = []uint32{acc.gid}
	// Without a group file there are just no more groups.
	_ = eachLine(filepath.Join(etc, "group"), 4, func(f []string) bool {
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err == nil && uint32(gid) != acc.gid && slices.Contains(strings.Split(f[3], ","), name) {
			acc.groups = append(acc.groups, uint32(gid))
		}
		return true
	})
	return acc, nil
}

// eachLine calls f with the fields of every line that has at least n of them.
func eachLine(path string, n int, f func([]string) bool) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	s := bufio.NewScanner(file)
	for s.Scan() {
		if fields := strings.Split(s.Text(), ":"); len(fields) >= n && !f(fields) {
			return nil
		}
	}
	return s.Err()
}

// own reports whether acc is the account this process runs as.
func (a account) own() bool { return int(a.uid) == os.Getuid() }

// credential is nil if no change of user is needed. Only root can change.
func (a account) credential() *syscall.Credential {
	if a.own() {
		return nil
	}
	return &syscall.Credential{Uid: a.uid, Gid: a.gid, Groups: a.groups}
}

// env is the environment of a login.
func (a account) env() []string {
	path := "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
	if a.uid == 0 {
		path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	return []string{
		"PATH=" + path, "HOME=" + a.home, "USER=" + a.name, "LOGNAME=" + a.name, "SHELL=" + a.shell,
	}
}

// maxEnvironment bounds what is read of the file environment, in bytes.
const maxEnvironment = 64 << 10

// environment returns what the file environment below etc sets for every login, as
// pam_env(8) reads it: NAME=VALUE lines, comments, and quotes around values. Without the file there is nothing.
func environment(etc string) []string {
	file, err := os.Open(filepath.Join(etc, "environment"))
	if err != nil {
		return nil
	}
	defer file.Close()
	var env []string
	s := bufio.NewScanner(io.LimitReader(file, maxEnvironment))
	for s.Scan() {
		line := strings.TrimPrefix(strings.TrimSpace(s.Text()), "export ")
		name, value, ok := strings.Cut(line, "=")
		if !ok || name == "" || strings.ContainsFunc(name, func(r rune) bool {
			return r != '_' && (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z')
		}) {
			continue
		}
		if n := len(value); n > 1 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		env = append(env, name+"="+value)
	}
	return env
}
