// SPDX-License-Identifier: Apache-2.0

//go:build linux

package sshd

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newSigner(t *testing.T) ssh.Signer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// dial serves one connection, and logs in to it as "me".
func dial(t *testing.T, shell string) (*ssh.Client, func()) {
	t.Helper()
	dir := t.TempDir()
	passwd := fmt.Sprintf("me:x:%d:%d::%s:%s\n", os.Getuid(), os.Getgid(), dir, shell)
	if err := os.WriteFile(filepath.Join(dir, "passwd"), []byte(passwd), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	host, key := newSigner(t), newSigner(t)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		c, err := l.Accept()
		if err == nil {
			_ = Serve(ctx, c, Config{HostKey: host, Authorized: []ssh.PublicKey{key.PublicKey()}, Etc: dir})
		}
	})
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	sc, chans, reqs, err := ssh.NewClientConn(conn, "", &ssh.ClientConfig{
		User: "me", Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, HostKeyCallback: ssh.FixedHostKey(host.PublicKey()),
	})
	if err != nil {
		t.Fatal(err)
	}
	c := ssh.NewClient(sc, chans, reqs)
	stop := sync.OnceFunc(func() { c.Close(); cancel(); wg.Wait() })
	t.Cleanup(stop)
	return c, stop
}

func newSession(t *testing.T, c *ssh.Client) *ssh.Session {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestForward(t *testing.T) {
	c, _ := dial(t, "/bin/sh")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer l.Close()
	wg.Go(func() { upper(l) })
	conn, err := c.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "HELLO" {
		t.Errorf("got %q, %v", got, err)
	}
	addr := l.Addr().String()
	l.Close()
	if _, err := c.Dial("tcp", addr); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("to a closed port: %v", err)
	}
}

func TestRequests(t *testing.T) {
	c, _ := dial(t, "/bin/sh")
	if _, _, err := c.OpenChannel("x11", nil); err == nil || err.Error() != "ssh: rejected: unknown channel type (\"lab-agent does not offer x11\")" {
		t.Errorf("unknown channel: %v", err)
	}
	// Any answer keeps a client that asks for a sign of life happy.
	if _, _, err := c.SendRequest("keepalive@openssh.com", true, nil); err != nil {
		t.Errorf("keepalive: %v", err)
	}
	s := newSession(t, c)
	for _, v := range [][2]string{{"LC_TEST", "ok"}, {"BAD=NAME", "x"}, {"NUL", "\x00"}} {
		err := s.Setenv(v[0], v[1])
		if ok := v[0] == "LC_TEST"; ok != (err == nil) {
			t.Errorf("setting %q: %v", v[0], err)
		}
	}
	if err := s.RequestSubsystem("netconf"); err == nil {
		t.Error("an unknown subsystem was started")
	}
	out, err := s.Output("echo $LC_TEST")
	if err != nil || string(out) != "ok\n" {
		t.Errorf("got %q, %v", out, err)
	}
	// One session runs one thing.
	s = newSession(t, c)
	if err := s.Start("sleep 60"); err != nil {
		t.Fatal(err)
	}
	if ok, err := s.SendRequest("exec", true, ssh.Marshal(struct{ C string }{"true"})); ok || err != nil {
		t.Errorf("a second command: %v, %v", ok, err)
	}
}

func TestMissingShell(t *testing.T) {
	c, _ := dial(t, "/no/such/shell")
	s := newSession(t, c)
	var errOut bytes.Buffer
	s.Stderr = &errOut
	err := s.Run("true")
	var exit *ssh.ExitError
	if !errors.As(err, &exit) || exit.ExitStatus() != 127 {
		t.Errorf("got %v, want exit code 127", err)
	}
	if want := "lab-agent: fork/exec /no/such/shell: no such file or directory\n"; errOut.String() != want {
		t.Errorf("told %q, want %q", &errOut, want)
	}
}

func TestTerminalModes(t *testing.T) {
	c, _ := dial(t, "/bin/sh")
	s := newSession(t, c)
	modes := ssh.TerminalModes{ssh.ECHO: 0, ssh.ONLCR: 0, ssh.VINTR: 7, ssh.VEOF: 255}
	if err := s.RequestPty("vt100", 20, 70, modes); err != nil {
		t.Fatal(err)
	}
	out, err := s.Output("stty -a; ls -l $(tty) >/dev/null && echo tty")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"rows 20; columns 70", "intr = ^G;", "eof = <undef>;", " -echo ", " -onlcr ", " icanon ", "tty\n"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("stty says\n%s\nwant %q", out, want)
		}
	}
}

func TestTerminalHangup(t *testing.T) {
	c, stop := dial(t, "/bin/sh")
	s := newSession(t, c)
	if err := s.RequestPty("vt100", 20, 70, nil); err != nil {
		t.Fatal(err)
	}
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	// Not even ignoring the signal keeps a terminal open.
	if err := s.Start("trap '' HUP; echo $$; exec cat"); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	stop()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err != nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the process outlived its terminal")
		}
	}
}

func TestLookup(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"passwd": "# comment\nroot:x:0:0:root:/root:/bin/bash\nbad:x:one:2::/:\nshort:x:1\nlab:x:1000:1001:,,,:/home/lab:\nempty:x:5:6:::/bin/sh\n",
		"group":  "root:x:0:\nsudo:x:27:alice,lab\nlab:x:1001:lab\nodd:x:x:lab\nlabs:x:99:labs,xlab\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{
		"root":  "{root 0 0 [0] /root /bin/bash} <nil>",
		"lab":   "{lab 1000 1001 [1001 27] /home/lab /bin/sh} <nil>",
		"empty": "{empty 5 6 [6] / /bin/sh} <nil>",
		"bad":   `{ 0 0 []  } no such user: "bad"`,
		"short": `{ 0 0 []  } no such user: "short"`,
		"":      `{ 0 0 []  } no such user: ""`,
	} {
		acc, err := lookup(dir, name)
		if got := fmt.Sprint(acc, " ", err); got != want {
			t.Errorf("%q: got %s, want %s", name, got, want)
		}
	}
	if _, err := lookup(t.TempDir(), "me"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no passwd: %v", err)
	}
}
