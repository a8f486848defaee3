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

// account is somebody whom lab runs as. Each test has a world of the account's to itself, so
// that tests can run at the same time.
type account struct {
	name  string              // "root" or "user"
	cred  *syscall.Credential // nil for the user of the tests
	bases string              // where the worlds have their base
	runs  string              // and their XDG_RUNTIME_DIR

	boxes func() (string, error) // a store with the built-in boxes, filled when it is first asked for

	mu    sync.Mutex
	made  int    // worlds
	accel []byte // what the worlds have found out about this host, if they have
}

// world is a user's home with all the directories of lab, in which labs are tried.
type world struct {
	*account
	base string // everything on disk
	run  string // XDG_RUNTIME_DIR: short, for socket paths
}

// accounts are whom every test runs as: root and an ordinary user; only the latter if
// the tests do not run as root.
var accounts []*account

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
		accounts = []*account{newAccount("user", base, sockets, nil)}
		return m.Run(), nil
	}
	cred, forget, err := makeUser()
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, forget()) }()
	accounts = []*account{newAccount("root", base, sockets, nil), newAccount("user", base, sockets, cred)}
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

func newAccount(name, bases, runs string, cred *syscall.Credential) *account {
	a := &account{name: name, cred: cred, bases: bases, runs: runs}
	a.boxes = sync.OnceValues(a.stock)
	return a
}

// world makes a world that has the built-in boxes. When the test ends, the world does,
// and nothing of any lab may be left in it.
func (a *account) world(t testing.TB) *world {
	t.Helper()
	boxes, err := a.boxes()
	if err != nil {
		t.Fatalf("the built-in boxes: %v", err)
	}
	w, err := a.newWorld()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.end(t) })
	if err := errors.Join(link(boxes, filepath.Join(w.data(), "boxes")), w.remember(), w.own(w.base)); err != nil {
		t.Fatal(err)
	}
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
