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
	"testing"

	"github.com/labfile/lab/providers/libvirt/daemontest"
)

// world is a user with directories of their own, in which labs are tried.
type world struct {
	name string              // "root" or "user"
	base string              // everything on disk
	run  string              // XDG_RUNTIME_DIR: short, for socket paths
	cred *syscall.Credential // whom lab runs as; nil for the user of the tests

	boxes sync.Once // fills the world's store
}

// worlds are what every test runs in: root's and an ordinary user's; only the
// latter if the tests do not run as root.
var worlds []*world

// labBinary is the lab under test.
var labBinary string

func TestMain(m *testing.M) {
	daemontest.Main()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	built, err := filepath.Abs(env("LAB_BIN", "../../bin/lab"))
	if err != nil {
		return 1, err
	}
	if _, err := os.Stat(built); err != nil {
		return 1, fmt.Errorf("there is no lab to test (run \"make build\"): %w", err)
	}
	// Everybody must be able to reach it, which is not so below /root.
	if err := tidy(); err != nil {
		return 1, err
	}
	base, err := os.MkdirTemp("/var/tmp", fmt.Sprintf("lab-e2e-%d-", os.Getpid()))
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(base)) }()
	if err := os.Chmod(base, 0o755); err != nil {
		return 1, err
	}
	labBinary = filepath.Join(base, "lab")
	if err := copyFile(built, labBinary, 0o755); err != nil {
		return 1, err
	}
	if os.Getuid() != 0 {
		w, err := newWorld("user", base, nil)
		if err != nil {
			return 1, err
		}
		defer w.remove()
		worlds = []*world{w}
		return m.Run(), nil
	}
	root, err := newWorld("root", base, nil)
	if err != nil {
		return 1, err
	}
	defer root.remove()
	cred, forget, err := makeUser()
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, forget()) }()
	ordinary, err := newWorld("user", base, cred)
	if err != nil {
		return 1, err
	}
	defer ordinary.remove()
	worlds = []*world{root, ordinary}
	return m.Run(), nil
}

// tidy removes what earlier runs left that were killed themselves.
func tidy() error {
	bases, err := filepath.Glob("/var/tmp/lab-e2e-*-*")
	if err != nil {
		return err
	}
	for _, base := range bases {
		pid, _, _ := strings.Cut(strings.TrimPrefix(base, "/var/tmp/lab-e2e-"), "-")
		if _, err := os.Stat("/proc/" + pid); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		for _, p := range processesBelow(base) {
			_ = syscall.Kill(p.pid, syscall.SIGKILL) // it may have ended, or be somebody else's
		}
		if err := os.RemoveAll(base); err != nil && !errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	return nil
}

// eachWorld runs a test once as every user.
func eachWorld(t *testing.T, test func(t *testing.T, w *world)) {
	for _, w := range worlds {
		t.Run(w.name, func(t *testing.T) { test(t, w) })
	}
}

func newWorld(name, base string, cred *syscall.Credential) (*world, error) {
	w := &world{name: name, base: filepath.Join(base, name), cred: cred}
	run, err := os.MkdirTemp("/tmp", "lab-")
	if err != nil {
		return nil, err
	}
	w.run = run
	for _, dir := range []string{w.base, w.path("home"), w.path("sites")} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
		if err := w.own(dir); err != nil {
			return nil, err
		}
	}
	return w, w.own(run)
}

func (w *world) remove() {
	// What is left here was complained about by the test that left it.
	_ = os.RemoveAll(w.run)
}

func (w *world) path(elem ...string) string {
	return filepath.Join(append([]string{w.base}, elem...)...)
}

// own gives a file or folder to the world's user.
func (w *world) own(path string) error {
	if w.cred == nil {
		return nil
	}
	return filepath.WalkDir(path, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, int(w.cred.Uid), int(w.cred.Gid))
	})
}

// uid is the user that lab runs as.
func (w *world) uid() int {
	if w.cred == nil {
		return os.Getuid()
	}
	return int(w.cred.Uid)
}

// env is the environment of every command in this world; more overrides it.
func (w *world) env(more ...string) []string {
	var env []string
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		switch {
		case strings.HasPrefix(name, "XDG_"), strings.HasPrefix(name, "LC_"):
		case strings.HasPrefix(name, "LAB_") && name != "LAB_DEBIAN_MIRROR":
		case name == "HOME", name == "USER", name == "LOGNAME", name == "LANG", name == "TERM", name == "PWD",
			name == "NO_COLOR", name == "TMPDIR":
		default:
			env = append(env, kv)
		}
	}
	env = append(
		env,
		"HOME="+w.path("home"),
		"XDG_DATA_HOME="+w.path("data"),
		"XDG_CACHE_HOME="+w.path("cache"),
		"XDG_CONFIG_HOME="+w.path("config"),
		"XDG_RUNTIME_DIR="+w.run,
		"LANG=C.UTF-8", "TERM=dumb",
	)
	return append(env, more...)
}

// data and runtime are lab's own directories in this world.
func (w *world) data() string    { return w.path("data", "lab") }
func (w *world) runtime() string { return filepath.Join(w.run, "lab") }

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

func env(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}

func copyFile(from, to string, mode fs.FileMode) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, mode)
}
