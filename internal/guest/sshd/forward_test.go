// SPDX-License-Identifier: Apache-2.0

//go:build linux

package sshd

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	sshagent "golang.org/x/crypto/ssh/agent"
)

// upper answers each connection with what it got, in capitals, once that is complete:
// half-close must get through.
func upper(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		b, _ := io.ReadAll(conn)
		_, _ = conn.Write(bytes.ToUpper(b))
		conn.Close()
	}
}

// asked sends "hello" to a port and returns the answer.
func asked(t *testing.T, address string) string {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(got)
}

func TestRemoteForward(t *testing.T) {
	c, stop := dial(t, "/bin/sh")
	l, err := c.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil || port == "0" {
		t.Fatal(l.Addr(), err)
	}
	done := make(chan struct{})
	go func() { defer close(done); upper(l) }()
	if got := asked(t, "127.0.0.1:"+port); got != "HELLO" {
		t.Errorf("got %q", got)
	}
	// Whatever address was asked for, only the guest's own loopback leads to the client.
	if l, err := net.Listen("tcp", "127.0.0.2:"+port); err != nil {
		t.Errorf("another address of the guest is taken, too: %v", err)
	} else {
		l.Close()
	}
	if _, err := c.Listen("tcp", "127.0.0.1:"+port); err == nil {
		t.Error("one port was given twice")
	}
	l.Close()
	<-done
	if _, err := net.Dial("tcp", "127.0.0.1:"+port); err == nil {
		t.Error("the port is open after its forward was cancelled")
	}
	var ports []string
	for range maxListeners {
		l, err := c.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ports = append(ports, l.Addr().String())
	}
	if _, err := c.Listen("tcp", "127.0.0.1:0"); err == nil {
		t.Error("a client may listen on any number of ports")
	}
	stop()
	for _, p := range ports {
		if _, err := net.Dial("tcp", p); err == nil {
			t.Errorf("%s is open after the client has left", p)
		}
	}
}

// A port below 1024 is root's.
func TestListenPrivileged(t *testing.T) {
	l := &listeners{acc: account{uid: 1000}, open: map[bound]net.Listener{}}
	if _, _, err := l.listen(bound{"", 80}); err != errRefused {
		t.Errorf("got %v", err)
	}
	if _, _, err := l.listen(bound{"", 1 << 16}); err != errRefused {
		t.Errorf("got %v", err)
	}
}

func TestAgentForward(t *testing.T) {
	c, stop := dial(t, "/bin/sh")
	keys := sshagent.NewKeyring()
	if err := sshagent.ForwardToAgent(c, keys); err != nil {
		t.Fatal(err)
	}
	plain := newSession(t, c)
	if out, err := plain.Output("echo ${SSH_AUTH_SOCK-none}"); err != nil || string(out) != "none\n" {
		t.Errorf("a session that does not ask has %q, %v", out, err)
	}
	s := newSession(t, c)
	if err := sshagent.RequestAgentForwarding(s); err != nil {
		t.Fatal(err)
	}
	if ok, err := s.SendRequest(requestAgent, true, nil); ok || err != nil {
		t.Errorf("a second request: %v, %v", ok, err)
	}
	in, err := s.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start("echo $SSH_AUTH_SOCK; exec cat"); err != nil {
		t.Fatal(err)
	}
	var path string
	if _, err := fmt.Fscan(out, &path); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(filepath.Dir(path))
	if err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("the socket's directory: %v, %v", fi, err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	seen := sshagent.NewClient(conn)
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if list, err := seen.List(); err != nil || len(list) != 0 {
		t.Errorf("the agent has %v, %v", list, err)
	}
	if err := seen.Add(sshagent.AddedKey{PrivateKey: &key, Comment: "from the guest"}); err != nil {
		t.Error(err)
	}
	if list, err := keys.List(); err != nil || len(list) != 1 || list[0].Comment != "from the guest" {
		t.Errorf("the client's agent has %v, %v", list, err)
	}
	in.Close()
	if err := s.Wait(); err != nil {
		t.Error(err)
	}
	// The connection ends with the session, though the guest holds it, and the socket is gone.
	if b, err := io.ReadAll(conn); err != nil || len(b) > 0 {
		t.Errorf("after the session: %q, %v", b, err)
	}
	conn.Close()
	stop()
	if _, err := os.Stat(filepath.Dir(path)); !os.IsNotExist(err) {
		t.Errorf("the socket's directory is left: %v", err)
	}
}
