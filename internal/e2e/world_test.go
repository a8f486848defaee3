// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/labfile/lab/providers/libvirt/daemontest"
)

// world is a user's home with all the directories of lab, in which labs are tried.
type world struct {
	*account
	base string // everything on disk
	run  string // XDG_RUNTIME_DIR: short, for socket paths
}

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
	// Paths of sockets have no room for more.
	sockets, err := os.MkdirTemp("/tmp", "lab-")
	if err != nil {
		return 1, err
	}
	// What is left there was complained about by the test that left it.
	defer func() { err = errors.Join(err, os.RemoveAll(sockets)) }()
	if err := os.Chmod(sockets, 0o755); err != nil {
		return 1, err
	}
	if os.Getuid() != 0 {
		accounts = []*account{newAccount("user", base, sockets, nil, nil)}
		return m.Run(), nil
	}
	cred, forget, err := makeUser()
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, forget()) }()
	root := newAccount("root", base, sockets, nil, nil)
	accounts = []*account{root, newAccount("user", base, sockets, cred, root)}
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

// eachUser runs a test once as every user, at the same time as other tests.
func eachUser(t *testing.T, test func(t *testing.T, w *world)) {
	t.Parallel()
	for _, a := range accounts {
		t.Run(a.name, func(t *testing.T) {
			t.Parallel()
			test(t, a.world(t))
		})
	}
}

// ordinary makes a world of an ordinary user, for a test to which it makes no
// difference who the user is, at the same time as other tests.
func ordinary(t *testing.T) *world {
	t.Helper()
	t.Parallel()
	return accounts[len(accounts)-1].world(t)
}

// world makes a world that has the box builtin/tiny. When the test ends, the world does,
// and nothing of any lab may be left in it.
func (a *account) world(t testing.TB) *world {
	t.Helper()
	w, err := a.newWorld()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.end(t) })
	if err := errors.Join(w.remember(), w.own(w.base)); err != nil {
		t.Fatal(err)
	}
	w.stocked(t, a.tiny)
	return w
}

// newWorld makes an empty world.
func (a *account) newWorld() (*world, error) {
	a.mu.Lock()
	a.made++
	name := fmt.Sprintf("%.1s%d", a.name, a.made) // short: libvirt has sockets below the base
	a.mu.Unlock()
	w := &world{account: a, base: filepath.Join(a.bases, name), run: filepath.Join(a.runs, name)}
	for _, dir := range []string{w.base, w.run, w.path("home"), w.path("sites")} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
		if err := w.own(dir); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// end removes the world, after its sites have removed their labs.
func (w *world) end(t testing.TB) {
	t.Helper()
	for _, dir := range []string{filepath.Join(w.data(), "labs"), w.runtime()} {
		left, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
		for _, e := range left {
			t.Errorf("left over in the world: %s", filepath.Join(dir, e.Name()))
		}
	}
	for _, p := range processesBelow(w.base) { // complained about by the site
		_ = syscall.Kill(p.pid, syscall.SIGKILL) // it may have ended just now
	}
	if err := errors.Join(w.learn(), os.RemoveAll(w.base), os.RemoveAll(w.run)); err != nil {
		t.Error(err)
	}
}

// learn keeps what lab found out in this world by a probe that may take seconds, and
// remember gives it to another.
func (w *world) learn() error {
	b, err := os.ReadFile(w.path("cache", "lab", "accel.json"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.accel = b
	return nil
}

func (w *world) remember() error {
	w.mu.Lock()
	b := w.accel
	w.mu.Unlock()
	if b == nil {
		return nil
	}
	dir := w.path("cache", "lab")
	return errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, "accel.json"), b, 0o600))
}

func (w *world) path(elem ...string) string {
	return filepath.Join(append([]string{w.base}, elem...)...)
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
