// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/guest/agent"
	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/guest/channel"
	"github.com/labfile/lab/internal/guest/filestream"
	"github.com/labfile/lab/internal/guest/sshd"
	"github.com/labfile/lab/internal/lab"
)

// TestMain is also the program that serves sftp, or a stream of files.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "sftp" || os.Args[1] == "files") {
		err := error(nil)
		if os.Args[1] == "sftp" {
			err = sshd.ServeSFTP(os.Stdin, os.Stdout)
		} else {
			err = filestream.Serve(context.Background(), os.Stdin, os.Stdout)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		// A program under the race detector takes a second to end.
		_ = syscall.Exec("/bin/true", []string{"true"}, nil)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// testMachine is a Machine that writes down what it is told.
type testMachine struct {
	mu   sync.Mutex
	told []string
}

func (m *testMachine) note(format string, args ...any) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.told = append(m.told, fmt.Sprintf(format, args...))
	return nil
}

func (m *testMachine) SetHostname(name string) error { return m.note("hostname %s", name) }
func (m *testMachine) SetClock(t time.Time) error    { return m.note("clock") }
func (m *testMachine) AddEntropy(b []byte) error     { return m.note("entropy %d", len(b)) }
func (m *testMachine) SetNetwork(id agentapi.Identity) error {
	return m.note("network %s %s %s", id.MAC, id.Address, id.Gateway)
}
func (m *testMachine) GrowRoot() error            { return m.note("grow") }
func (m *testMachine) Sync() error                { return m.note("sync") }
func (m *testMachine) Shutdown(reboot bool) error { return m.note("shutdown, reboot %v", reboot) }

// box is a guest without a machine around it: a real agent with a root directory of
// its own, at the other end of a real channel.
type box struct {
	guest.Target
	dir     string // its root
	home    string
	machine *testMachine
	agent   *agent.Agent
	session *channel.Session
	id      guest.Identity
}

func newKey(t *testing.T) guest.Key {
	t.Helper()
	k, err := guest.NewKey("test")
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// newBox starts a guest whose user "me" is whoever runs the test.
func newBox(t *testing.T) *box {
	t.Helper()
	dir := t.TempDir()
	// Other users must be able to get there.
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	home := filepath.Join(dir, "home")
	for _, d := range []string{home, filepath.Join(dir, "etc"), filepath.Join(dir, "nobody")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	passwd := fmt.Sprintf("me:x:%d:%d::%s:/bin/sh\nnobody:x:65534:65534::%s:/bin/sh\n",
		os.Getuid(), os.Getgid(), home, filepath.Join(dir, "nobody"))
	if err := os.WriteFile(filepath.Join(dir, "etc/passwd"), []byte(passwd), 0o644); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	b := &box{dir: dir, home: home, machine: &testMachine{}}
	a := &agent.Agent{
		Version: "test", Root: root, Machine: b.machine, SFTP: []string{os.Args[0], "sftp"}, Files: []string{os.Args[0], "files"},
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	b.agent = a
	hostEnd, guestEnd := net.Pipe()
	ctx, cancel := context.WithCancel(context.Background())
	var wg, streams sync.WaitGroup
	wg.Go(func() {
		_ = channel.Serve(ctx, guestEnd, func(c net.Conn) {
			streams.Add(1)
			defer streams.Done()
			a.Stream(ctx, c)
		})
	})
	b.session, err = channel.Client(testContext(t), hostEnd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		b.session.Close()
		cancel()
		wg.Wait()
		streams.Wait()
		root.Close()
	})
	key, host := newKey(t), newKey(t)
	b.Target = guest.Target{Machine: "web", User: "me", Key: key.Signer, HostKey: host.Signer.PublicKey()}
	b.Agent = b.session.Open
	network := lab.NetworkOf("shop-1")
	b.id, err = guest.NewIdentity(guest.IdentityConfig{
		Machine: "web", Address: network.Host(10), Network: network,
		AuthorizedKey: key.Signer.PublicKey(), HostKey: host, Users: []string{"me"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// without takes a program away from the commands of the box's user.
func (b *box) without(t *testing.T, program string) {
	t.Helper()
	b.instead(t, program, "exit 127")
}

// instead has the commands of the box's user run a shell script in the place of a program.
func (b *box) instead(t *testing.T, program, script string) {
	t.Helper()
	shell, bin := filepath.Join(b.dir, "shell"), filepath.Join(b.dir, "instead")
	passwd := filepath.Join(b.dir, "etc/passwd")
	users, err := os.ReadFile(passwd)
	if err == nil {
		err = os.WriteFile(passwd, bytes.Replace(users, []byte(":/bin/sh"), []byte(":"+shell), 1), 0o644)
	}
	err = errors.Join(err, os.MkdirAll(bin, 0o755),
		os.WriteFile(shell, []byte("#!/bin/sh\nPATH='"+bin+"':$PATH exec /bin/sh \"$@\"\n"), 0o755),
		os.WriteFile(filepath.Join(bin, program), []byte("#!/bin/sh\n"+script+"\n"), 0o755))
	if err != nil {
		t.Fatal(err)
	}
}

func (b *box) stream(t *testing.T) net.Conn {
	t.Helper()
	c, err := b.session.Open(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// connect gives the box its identity and logs in.
func (b *box) connect(t *testing.T) *guest.Client {
	t.Helper()
	if err := guest.Identify(testContext(t), b.stream(t), b.id); err != nil {
		t.Fatal(err)
	}
	c, err := guest.Connect(testContext(t), b.Target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// run runs a shell command and returns what it printed.
func run(t *testing.T, c *guest.Client, cmd guest.Command) (string, error) {
	t.Helper()
	var out bytes.Buffer
	cmd.Stdout = &out
	err := c.Run(testContext(t), cmd)
	return out.String(), err
}

func TestIdentity(t *testing.T) {
	b := newBox(t)
	ctx := testContext(t)
	_, err := guest.Connect(ctx, b.Target)
	want := `reaching the ssh server of machine "web": the agent refused "ssh": this machine has not been given an identity yet`
	if err == nil || err.Error() != want {
		t.Errorf("before the identity: %v, want %s", err, want)
	}
	hello, err := guest.SayHello(ctx, b.stream(t))
	if err != nil || hello.Version != "test" || hello.Identity != "" {
		t.Errorf("hello before the identity: %+v, %v", hello, err)
	}
	if hello, err = guest.IdentifyHello(ctx, b.stream(t), b.id); err != nil {
		t.Fatal(err)
	}
	if hello.Identity != b.id.Fingerprint() || len(hello.Warnings) > 0 {
		t.Errorf("hello: %+v, want identity %s", hello, b.id.Fingerprint())
	}
	network := fmt.Sprintf("network %s %s %s", b.id.MAC, b.id.Address, b.id.Gateway)
	told := []string{"entropy 64", "clock", "hostname web", network, "grow"}
	if got := b.machine.told; fmt.Sprint(got) != fmt.Sprint(told) {
		t.Errorf("the machine was told %q, want %q", got, told)
	}
	// The second time only what is of the moment is done.
	if err := guest.Identify(ctx, b.stream(t), b.id); err != nil {
		t.Fatal(err)
	}
	told = append(told, "entropy 64", "clock")
	if got := b.machine.told; fmt.Sprint(got) != fmt.Sprint(told) {
		t.Errorf("the machine was told %q, want %q", got, told)
	}
	if err := errors.Join(guest.Sync(ctx, b.stream(t)), guest.Poweroff(ctx, b.stream(t)), guest.Reboot(ctx, b.stream(t))); err != nil {
		t.Fatal(err)
	}
	told = append(told, "sync", "shutdown, reboot false", "shutdown, reboot true")
	if got := b.machine.told; fmt.Sprint(got) != fmt.Sprint(told) {
		t.Errorf("the machine was told %q, want %q", got, told)
	}
}

func TestIdentityRefused(t *testing.T) {
	b := newBox(t)
	b.id.HostKey = []byte("nonsense")
	err := guest.Identify(testContext(t), b.stream(t), b.id)
	want := `the agent refused "identify": reading the host key: ssh: no key found`
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	_, err = guest.NewIdentity(guest.IdentityConfig{
		Machine: "web", Address: netip.MustParseAddr("::1"), AuthorizedKey: newKey(t).Signer.PublicKey(), HostKey: newKey(t),
	})
	if want := "identity: ::1 is not an IPv4 address"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestHostKeyIsVerified(t *testing.T) {
	b := newBox(t)
	b.connect(t)
	other := b.Target
	other.HostKey = newKey(t).Signer.PublicKey()
	_, err := guest.Connect(testContext(t), other)
	if !errors.Is(err, guest.ErrHostKey) {
		t.Errorf("another host key: %v, want ErrHostKey", err)
	}
	other.HostKey = nil
	_, err = guest.Connect(testContext(t), other)
	if want := `logging in to machine "web": its keys are not known`; err == nil || err.Error() != want {
		t.Errorf("no host key: %v, want %s", err, want)
	}
}

func TestLoginIsVerified(t *testing.T) {
	b := newBox(t)
	b.connect(t)
	for _, c := range []struct {
		user string
		key  guest.Key
	}{{"me", newKey(t)}, {"stranger", guest.Key{Signer: b.Key}}} {
		other := b.Target
		other.User, other.Key = c.user, c.key.Signer
		_, err := guest.Connect(testContext(t), other)
		want := fmt.Sprintf(`logging in to machine "web": login refused for user %q`, c.user)
		if !errors.Is(err, guest.ErrLogin) || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestRun(t *testing.T) {
	b := newBox(t)
	c := b.connect(t)
	for _, tc := range []struct {
		name string
		cmd  guest.Command
		out  string
		err  string
	}{
		{"args", guest.Command{Args: []string{"printf", "%s|", "a b", "", "it's", "$HOME"}}, "a b||it's|$HOME|", ""},
		{"shell", guest.Command{Shell: "echo $((1+2)) | cat"}, "3\n", ""},
		{"environment", guest.Command{Args: []string{"printenv", "X", "Y_2"}, Env: []string{"X=a b", "Y_2=it's"}}, "a b\nit's\n", ""},
		{"home", guest.Command{Shell: "pwd; echo $HOME $USER $LOGNAME $SHELL"}, b.home + "\n" + b.home + " me me /bin/sh\n", ""},
		{"stdin", guest.Command{Args: []string{"wc", "-c"}, Stdin: strings.NewReader("12345")}, "5\n", ""},
		{"no stdin", guest.Command{Args: []string{"cat"}}, "", ""},
		{"login shell", guest.Command{Stdin: strings.NewReader("echo $0\nexit 4\n")}, "-sh\n", "command ended with exit code 4"},
		{"exit code", guest.Command{Shell: "echo out; exit 42"}, "out\n", "command ended with exit code 42"},
		{"signal", guest.Command{Shell: "kill -TERM $$"}, "", "command was ended by signal SIGTERM"},
		{"unknown", guest.Command{Args: []string{"/no/such"}}, "", "command ended with exit code 127"},
		{"both", guest.Command{Args: []string{"a"}, Shell: "b"}, "", "running a command: both arguments and a command line were given"},
		{"bad variable", guest.Command{Shell: "b", Env: []string{"a-b=1"}}, "", `running a command: "a-b=1" does not set a variable`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, err := run(t, c, tc.cmd)
			if out != tc.out {
				t.Errorf("printed %q, want %q", out, tc.out)
			}
			if got := fmt.Sprint(err); err != nil && got != tc.err || err == nil && tc.err != "" {
				t.Errorf("error %v, want %q", err, tc.err)
			}
		})
	}
}

func TestRunStderr(t *testing.T) {
	c := newBox(t).connect(t)
	var out, errOut bytes.Buffer
	if err := c.Run(testContext(t), guest.Command{Shell: "echo out; echo err >&2", Stdout: &out, Stderr: &errOut}); err != nil {
		t.Fatal(err)
	}
	if out.String() != "out\n" || errOut.String() != "err\n" {
		t.Errorf("got %q and %q", &out, &errOut)
	}
}

func TestRunConcurrently(t *testing.T) {
	c := newBox(t).connect(t)
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			out, err := run(t, c, guest.Command{Args: []string{"echo", fmt.Sprint(i)}})
			if err != nil || out != fmt.Sprintln(i) {
				t.Errorf("command %d: %q, %v", i, out, err)
			}
		})
	}
	wg.Wait()
}

// zeros is an endless input.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) { c.n += int64(len(p)); return len(p), nil }

func TestRunLargeData(t *testing.T) {
	c := newBox(t).connect(t)
	const size = 64 << 20
	var out counter
	err := c.Run(testContext(t), guest.Command{Args: []string{"cat"}, Stdin: io.LimitReader(zeros{}, size), Stdout: &out})
	if err != nil || out.n != size {
		t.Errorf("got %d bytes, %v; want %d", out.n, err, size)
	}
}

func TestRunEndsBeforeStdin(t *testing.T) {
	c := newBox(t).connect(t)
	r, w := io.Pipe()
	defer w.Close()
	if err := c.Run(testContext(t), guest.Command{Args: []string{"true"}, Stdin: r}); err != nil {
		t.Error(err)
	}
}

func TestRunLeavesDaemon(t *testing.T) {
	b := newBox(t)
	c := b.connect(t)
	// The daemon holds the output open; nobody waits for it.
	out, err := run(t, c, guest.Command{Shell: "sleep 60 & echo $! >pid; echo started"})
	if err != nil || out != "started\n" {
		t.Errorf("got %q, %v", out, err)
	}
	if out, err := run(t, c, guest.Command{Shell: "kill $(cat pid)"}); err != nil {
		t.Errorf("the daemon is gone: %v %s", err, out)
	}
}

func TestRunTTY(t *testing.T) {
	c := newBox(t).connect(t)
	resize := make(chan guest.Size, 1)
	in, say := io.Pipe()
	out := &watch{}
	done := make(chan error, 1)
	go func() {
		done <- c.Run(testContext(t), guest.Command{
			Shell: `stty size; echo $TERM; test -t 0 -a -t 1 -a -t 2 && echo terminal; trap 'stty size; exit 3' WINCH; echo waiting; while :; do read x; done`,
			Stdin: in, Stdout: out,
			TTY: &guest.TTY{Term: "xterm-test", Size: guest.Size{Columns: 101, Rows: 33}, Resize: resize},
		})
	}()
	out.wait(t, "33 101\r\nxterm-test\r\nterminal\r\nwaiting\r\n")
	resize <- guest.Size{Columns: 55, Rows: 44}
	// Some shells run traps only between commands.
	go func() { _, _ = say.Write([]byte("\n")) }()
	out.wait(t, "44 55\r\n")
	var exit *guest.ExitError
	if err := <-done; !errors.As(err, &exit) || exit.Code != 3 {
		t.Errorf("got %v, want exit code 3", err)
	}
	say.Close()
}

// watch is an output that can be waited for.
type watch struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (w *watch) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.Write(p)
}

func (w *watch) wait(t *testing.T, text string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		w.mu.Lock()
		got := w.buf.String()
		w.mu.Unlock()
		if strings.Contains(got, text) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("printed %q, want %q", got, text)
		}
	}
}

func TestRunCancelled(t *testing.T) {
	c := newBox(t).connect(t)
	for _, shell := range []string{
		"trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done",
		"trap '' TERM HUP; echo ready; while :; do sleep 0.05; done",
	} {
		ctx, cancel := context.WithCancelCause(testContext(t))
		out := &watch{}
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx, guest.Command{Shell: "echo $$; " + shell, Stdout: out}) }()
		out.wait(t, "ready\n")
		cause := errors.New("changed my mind")
		cancel(cause)
		if err := <-done; !errors.Is(err, cause) {
			t.Errorf("got %v, want %v", err, cause)
		}
		pid := strings.Fields(out.buf.String())[0]
		waitGone(t, pid)
	}
}

// TestRunOnSilence has a guest that lets lab in and then says nothing more.
func TestRunOnSilence(t *testing.T) {
	key, host := newKey(t), newKey(t)
	conf := &ssh.ServerConfig{PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, nil }}
	conf.AddHostKey(host.Signer)
	asked, ended := make(chan struct{}), make(chan struct{})
	target := guest.Target{Machine: "web", User: "me", Key: key.Signer, HostKey: host.Signer.PublicKey()}
	target.Port = func(context.Context, uint16) (net.Conn, error) {
		ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "ssh"))
		if err != nil {
			return nil, err
		}
		defer ln.Close()
		ours, err := net.Dial("unix", ln.Addr().String())
		if err != nil {
			return nil, err
		}
		theirs, err := ln.Accept()
		if err != nil {
			return nil, err
		}
		go func() {
			defer close(ended)
			_, chans, reqs, err := ssh.NewServerConn(theirs, conf)
			if err != nil {
				t.Error(err)
				return
			}
			go ssh.DiscardRequests(reqs)
			<-chans // a session is asked for
			close(asked)
			for range chans {
			}
		}()
		return ours, nil
	}
	c, err := guest.Connect(testContext(t), target)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	cause := errors.New("changed my mind")
	ctx, cancel := context.WithCancelCause(testContext(t))
	go func() { <-asked; cancel(cause) }()
	if err := c.Run(ctx, guest.Command{Shell: "true"}); !errors.Is(err, cause) {
		t.Errorf("got %v, want %v", err, cause)
	}
	<-ended
}

// waitGone waits until a process has ended.
func waitGone(t *testing.T, pid string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat("/proc/" + pid); errors.Is(err, os.ErrNotExist) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %s is still there", pid)
		}
	}
}

func TestHangup(t *testing.T) {
	b := newBox(t)
	c := b.connect(t)
	out := &watch{}
	done := make(chan error, 1)
	go func() {
		done <- c.Run(testContext(t), guest.Command{Shell: "echo $$; echo ready; sleep 1000", Stdout: out})
	}()
	out.wait(t, "ready\n")
	c.Close()
	if err := <-done; !errors.Is(err, guest.ErrDisconnected) {
		t.Errorf("got %v, want ErrDisconnected", err)
	}
	waitGone(t, strings.Fields(out.buf.String())[0])
}

func TestOtherUser(t *testing.T) {
	b := newBox(t)
	// Others may not enter the folder that the test's program is in.
	program, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	b.agent.SFTP = []string{filepath.Join(b.dir, "program"), "sftp"}
	b.agent.Files = []string{b.agent.SFTP[0], "files"}
	if err := os.WriteFile(b.agent.SFTP[0], program, 0o755); err != nil {
		t.Fatal(err)
	}
	b.connect(t)
	other := b.Target
	other.User = "nobody"
	c, err := guest.Connect(testContext(t), other)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if os.Getuid() != 0 {
		// Only root can become somebody else; anyone else is told so.
		var errOut bytes.Buffer
		err := c.Run(testContext(t), guest.Command{Args: []string{"id"}, Stderr: &errOut})
		if err == nil || !strings.Contains(errOut.String(), "operation not permitted") {
			t.Errorf("got %v, %q", err, &errOut)
		}
		return
	}
	home := filepath.Join(b.dir, "nobody")
	if err := os.Chown(home, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	out, err := run(t, c, guest.Command{Shell: "id -u; id -g; pwd; cat /proc/self/oom_score_adj"})
	if want := "65534\n65534\n" + home + "\n0\n"; err != nil || out != want {
		t.Errorf("got %q, %v; want %q", out, err, want)
	}
	src := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(src, []byte("text"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := c.Upload(testContext(t), []string{src}, "copy", guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	out, err = run(t, c, guest.Command{Shell: "stat -c '%u %a' copy; cat copy"})
	if want := "65534 640\ntext"; err != nil || out != want {
		t.Errorf("got %q, %v; want %q", out, err, want)
	}
	err = c.Upload(testContext(t), []string{src}, b.home+"/not-mine", guest.CopyOptions{})
	if !errors.Is(err, os.ErrPermission) {
		t.Errorf("writing to another's home: %v", err)
	}
}
