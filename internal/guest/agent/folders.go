// SPDX-License-Identifier: Apache-2.0

//go:build linux

package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/guest/hostfs"
)

// folders are the folders of the host that are mounted, by their path.
type folders struct {
	mu     sync.Mutex
	byPath map[string]*folder
}

// folder is a mounted folder: a process that outlives the connections to the host,
// so that a supervisor that starts anew finds the files that programs have open.
type folder struct {
	mu      sync.Mutex // one stream at a time mounts
	config  hostfs.Config
	control *net.UnixConn
	ended   chan struct{} // closed when the process has ended; nil if there is none
}

func (f *folders) at(path string) *folder {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.byPath == nil {
		f.byPath = map[string]*folder{}
	}
	if f.byPath[path] == nil {
		f.byPath[path] = &folder{}
	}
	return f.byPath[path]
}

// mount mounts a folder of the host, unless it is mounted already, and connects it
// with the host through c. The second stream of a folder needs the first.
func (a *Agent) mount(ctx context.Context, c net.Conn, want *agentapi.Folder, what byte) error {
	conn, ended, err := a.connect(ctx, want, what)
	if aerr := agentapi.Answer(c, err); aerr != nil || err != nil {
		if conn != nil {
			conn.Close()
		}
		return errors.Join(err, aerr)
	}
	over := make(chan struct{}, 2)
	go func() { _, _ = io.Copy(conn, c); over <- struct{}{} }()
	go func() { _, _ = io.Copy(c, conn); over <- struct{}{} }()
	select {
	case <-over:
	case <-ended: // the host tries again
	}
	return errors.Join(conn.Close(), c.Close())
}

// connect returns a connection to the process that has the folder, and what is closed when
// that ends.
func (a *Agent) connect(ctx context.Context, want *agentapi.Folder, what byte) (net.Conn, <-chan struct{}, error) {
	if want == nil || !path.IsAbs(want.Path) {
		return nil, nil, errors.New("no folder was named")
	}
	if len(a.Folders) == 0 {
		return nil, nil, errors.New("folders of the host cannot be mounted here")
	}
	uid, gid, err := a.ownerOf(want.Owner)
	if err != nil {
		return nil, nil, err
	}
	c := hostfs.Config{Path: place(want.Path), Source: want.Source, Writable: want.Writable, UID: uid, GID: gid}
	f := a.folders.at(c.Path)
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.serves(c) {
		if what == hostfs.ForCache {
			return nil, nil, errors.New("the folder is not mounted")
		}
		f.stop()
		if err := f.start(ctx, a.Folders, c); err != nil {
			return nil, nil, err
		}
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	theirs := os.NewFile(uintptr(fds[1]), "theirs")
	defer theirs.Close()
	file := os.NewFile(uintptr(fds[0]), "ours")
	defer file.Close()
	ours, err := net.FileConn(file)
	if err != nil {
		return nil, nil, err
	}
	if err := hostfs.Send(f.control, theirs, what); err != nil {
		ours.Close()
		return nil, nil, fmt.Errorf("connecting %s with the host: %w", c.Path, err)
	}
	return ours, f.ended, nil
}

func (f *folder) serves(c hostfs.Config) bool {
	if f.ended == nil || f.config != c {
		return false
	}
	select {
	case <-f.ended:
		return false
	default:
		return mountedAt(c.Path) // somebody may have unmounted it
	}
}

func (f *folder) stop() {
	if f.ended == nil {
		return
	}
	f.control.Close()
	<-f.ended
	f.ended = nil
}

// prepare makes the folder to mount at. What an earlier agent left behind is taken
// away.
func prepare(c hostfs.Config) error {
	for mountedAt(c.Path) {
		if err := unix.Unmount(c.Path, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("taking away what was mounted at %s: %w", c.Path, err)
		}
	}
	if err := loadFUSE(); err != nil {
		return err
	}
	if err := os.MkdirAll(c.Path, 0o755); err != nil {
		return fmt.Errorf("making the folder to mount at: %w", err)
	}
	return nil
}

// start starts the process that mounts a folder.
func (f *folder) start(ctx context.Context, command []string, c hostfs.Config) error {
	if err := prepare(c); err != nil {
		return err
	}
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	theirs, ours := os.NewFile(uintptr(fds[1]), "theirs"), os.NewFile(uintptr(fds[0]), "ours")
	defer ours.Close()
	cmd := exec.Command(command[0], append(command[1:len(command):len(command)], string(b))...)
	cmd.ExtraFiles = []*os.File{theirs} // hostfs.ControlFD
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		if mountedAt(c.Path) { // it was killed
			_ = unix.Unmount(c.Path, unix.MNT_DETACH)
		}
		close(ended)
	}()
	conn, err := net.FileConn(ours)
	if err != nil {
		return errors.Join(err, cmd.Process.Kill())
	}
	control, ok := conn.(*net.UnixConn)
	if !ok {
		return errors.Join(errors.New("a socket is of another kind"), conn.Close())
	}
	said, err := says(ctx, control)
	if err == nil && said != hostfs.OK {
		err = errors.New(strings.TrimSpace(said))
	}
	if err != nil {
		control.Close()
		<-ended
		return err
	}
	f.config, f.control, f.ended = c, control, ended
	return nil
}

// MountFolder mounts a folder in this process, for guests that have no agent: it says so on
// out, and serves it over in and out. When these have ended the folder stays, for those who
// use it to learn that the host has gone, until the next one takes its place.
func (a *Agent) MountFolder(in io.Reader, out io.WriteCloser, want agentapi.Folder) error {
	f, err := a.mountHere(want)
	if err != nil {
		_, _ = io.WriteString(out, err.Error()+"\n")
		return err
	}
	if _, err := io.WriteString(out, hostfs.OK); err != nil {
		return errors.Join(err, f.Close())
	}
	_ = f.Serve(struct {
		io.Reader
		io.WriteCloser
	}{in, out})
	f.Wait()
	return nil
}

func (a *Agent) mountHere(want agentapi.Folder) (*hostfs.FS, error) {
	uid, gid, err := a.ownerOf(want.Owner)
	if err != nil {
		return nil, err
	}
	c := hostfs.Config{Path: place(want.Path), Source: want.Source, Writable: want.Writable, UID: uid, GID: gid}
	if err := prepare(c); err != nil {
		return nil, err
	}
	return hostfs.Mount(c)
}

// says returns the first line that the process says.
func says(ctx context.Context, control net.Conn) (string, error) {
	defer context.AfterFunc(ctx, func() { control.Close() })()
	line, err := bufio.NewReader(control).ReadString('\n')
	if errors.Is(err, io.EOF) {
		err = errors.New("the process that mounts it has ended")
	}
	return line, err
}

// place is how the kernel calls a path: without the links that lead to it.
func place(p string) string {
	p = path.Clean(p)
	dir, err := filepath.EvalSymlinks(path.Dir(p))
	if err != nil {
		return p // it is made
	}
	return path.Join(dir, path.Base(p))
}

// mountedAt reports whether a folder of the host is what is mounted at path.
func mountedAt(path string) bool {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return false
	}
	found := false
	for line := range strings.Lines(string(b)) {
		if w := strings.Fields(line); len(w) > 2 && unescape.Replace(w[1]) == path {
			found = w[2] == hostfs.Type // the last one is on top
		}
	}
	return found
}

// unescape undoes what the kernel does to spaces.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// loadFUSE sees to it that the kernel has FUSE.
func loadFUSE() error {
	known := func() bool {
		b, err := os.ReadFile("/proc/filesystems")
		return err == nil && strings.Contains(string(b), "\tfuse\n") && device() == nil
	}
	if known() {
		return nil
	}
	out, err := exec.Command("modprobe", "fuse").CombinedOutput()
	if known() {
		return nil
	}
	if err != nil {
		return fmt.Errorf("the kernel has no FUSE: modprobe fuse: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return fmt.Errorf("the kernel has no FUSE: %w", device())
}

func device() error {
	_, err := os.Stat("/dev/fuse")
	return err
}

// ownerOf finds the numbers of "user:group", "user", or numbers. The group of a user
// alone is the user's own.
func (a *Agent) ownerOf(s string) (uid, gid uint32, err error) {
	user, group, both := strings.Cut(s, ":")
	if user == "" {
		user = "root"
	}
	number := func(s string) (uint32, bool) {
		n, err := strconv.ParseUint(s, 10, 32)
		return uint32(n), err == nil
	}
	uid, numeric := number(user)
	gid = uid
	if f, err := a.entry("etc/passwd", user, 4); !numeric {
		if err != nil {
			return 0, 0, err
		}
		uid, _ = number(f[2])
		gid, _ = number(f[3])
	}
	if !both {
		return uid, gid, nil
	}
	if gid, numeric = number(group); !numeric {
		f, err := a.entry("etc/group", group, 3)
		if err != nil {
			return 0, 0, err
		}
		gid, _ = number(f[2])
	}
	return uid, gid, nil
}

// entry finds the line of a name, which has at least n fields.
func (a *Agent) entry(file, name string, n int) ([]string, error) {
	b, err := a.Root.ReadFile(file)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Split(strings.TrimSpace(line), ":"); len(f) >= n && f[0] == name {
			return f, nil
		}
	}
	return nil, fmt.Errorf("the machine has no %s in /%s", name, file)
}
