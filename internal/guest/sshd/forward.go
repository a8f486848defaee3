// SPDX-License-Identifier: Apache-2.0

//go:build linux

package sshd

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/crypto/ssh"
)

// connect connects a client to a TCP port that the guest can reach (ssh -L, -W; RFC 4254,
// section 7.2).
func connect(ctx context.Context, nc ssh.NewChannel) {
	var to struct {
		Host       string
		Port       uint32
		Origin     string
		OriginPort uint32
	}
	if err := ssh.Unmarshal(nc.ExtraData(), &to); err != nil {
		_ = nc.Reject(ssh.ConnectionFailed, "malformed request")
		return
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(to.Host, strconv.Itoa(int(to.Port))))
	if err != nil {
		_ = nc.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	ch, reqs, err := nc.Accept()
	if err != nil {
		conn.Close()
		return
	}
	join(ctx, conn, ch, reqs)
}

// join copies both ways between a connection and a channel until both ways have ended,
// or ctx has, and closes both.
func join(ctx context.Context, conn net.Conn, ch ssh.Channel, reqs <-chan *ssh.Request) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	defer conn.Close()
	defer ch.Close()
	go ssh.DiscardRequests(reqs)
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = io.Copy(conn, ch)
		if c, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = c.CloseWrite()
		}
	})
	_, _ = io.Copy(ch, conn)
	_ = ch.CloseWrite()
	wg.Wait()
}

// accept opens a channel of the client's for each connection that l gets, until l is
// closed. It returns when all of them have ended.
func accept(ctx context.Context, l net.Listener, client ssh.Conn, kind string, extra func(net.Conn) []byte) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			ch, reqs, err := client.OpenChannel(kind, extra(conn))
			if err != nil {
				conn.Close()
				return
			}
			join(ctx, conn, ch, reqs)
		})
	}
}

// bound is an address as a client asked for it (RFC 4254, section 7.1).
type bound struct {
	Host string
	Port uint32
}

// listeners are the guest's ports that a client wants the connections of (ssh -R).
type listeners struct {
	conn ssh.Conn
	acc  account
	open map[bound]net.Listener
	wg   sync.WaitGroup
}

// maxListeners bounds how many ports one client listens on.
const maxListeners = 100

// close ends all listeners, and waits until nobody uses what they accepted.
func (l *listeners) close() {
	for _, n := range l.open {
		n.Close()
	}
	l.wg.Wait()
}

// handle answers a request of a connection that belongs to no channel; keepalives get
// their answer here.
func (l *listeners) handle(ctx context.Context, req *ssh.Request) {
	var at bound
	ok, answer := ssh.Unmarshal(req.Payload, &at) == nil, []byte(nil)
	switch {
	case ok && req.Type == "tcpip-forward":
		var n net.Listener
		var err error
		if n, at, err = l.listen(at); err != nil {
			ok = false
			break
		}
		answer = ssh.Marshal(struct{ Port uint32 }{at.Port})
		l.wg.Go(func() { l.accept(ctx, n, at) })
	case ok && req.Type == "cancel-tcpip-forward":
		n := l.open[at]
		if ok = n != nil; ok {
			n.Close()
			delete(l.open, at)
		}
	default:
		ok = false
	}
	if req.WantReply {
		_ = req.Reply(ok, answer)
	}
}

// errRefused says that a port may not be listened on. The protocol has no place for
// the reason.
var errRefused = errors.New("refused")

// listen listens on the guest's loopback, whatever address was asked for, as OpenSSH does
// by default: what the client offers is for this guest alone. Port 0 is any.
func (l *listeners) listen(at bound) (net.Listener, bound, error) {
	if at.Port > 65535 || len(l.open) >= maxListeners || at.Port > 0 && at.Port < 1024 && l.acc.uid != 0 {
		return nil, at, errRefused
	}
	n, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(at.Port))))
	if err != nil {
		return nil, at, err
	}
	at.Port = uint32(n.Addr().(*net.TCPAddr).Port)
	l.open[at] = n
	return n, at, nil
}

func (l *listeners) accept(ctx context.Context, n net.Listener, at bound) {
	accept(ctx, n, l.conn, "forwarded-tcpip", func(c net.Conn) []byte {
		from := c.RemoteAddr().(*net.TCPAddr)
		return ssh.Marshal(struct { // RFC 4254, section 7.2
			Host       string
			Port       uint32
			Origin     string
			OriginPort uint32
		}{at.Host, at.Port, from.IP.String(), uint32(from.Port)})
	})
}

// agent is a socket in the guest that leads to the client's ssh agent.
type agent struct {
	net.Listener
	dir string
}

// agentDir is where sockets are made, as OpenSSH has it.
const agentDir = "/tmp"

// newAgent makes a socket that only the account can use.
func newAgent(acc account) (*agent, error) {
	dir, err := os.MkdirTemp(agentDir, "ssh-*")
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", filepath.Join(dir, "agent"))
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	a := &agent{l, dir}
	if acc.own() {
		return a, nil
	}
	// The directory last: until then, only root can replace the socket.
	for _, path := range []string{l.Addr().String(), dir} {
		if err := os.Lchown(path, int(acc.uid), int(acc.gid)); err != nil {
			a.Close()
			return nil, err
		}
	}
	return a, nil
}

// Close removes the socket.
func (a *agent) Close() error { return errors.Join(a.Listener.Close(), os.RemoveAll(a.dir)) }

// serve hands connections to the client until the agent is closed
// (draft-ietf-sshm-ssh-agent, section 4; OpenSSH's names).
func (a *agent) serve(ctx context.Context, client ssh.Conn) {
	accept(ctx, a, client, "auth-agent@openssh.com", func(net.Conn) []byte { return nil })
}
