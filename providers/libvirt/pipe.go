// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// pipe is a connection through a program's standard input and output.
type pipe struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *os.File
	said *tail
	once sync.Once

	ended sync.Once
}

// Read tells what the program printed if it has ended: that is why.
func (p *pipe) Read(b []byte) (int, error) {
	n, err := p.out.Read(b)
	if err != nil {
		p.end() // by then it has said all
		if said := p.said.String(); said != "" {
			err = &errSaid{said, err}
		}
	}
	return n, err
}

// errSaid is the end of a program that said why.
type errSaid struct {
	said string
	err  error
}

func (e *errSaid) Error() string { return e.said }
func (e *errSaid) Unwrap() error { return e.err }

func (p *pipe) Write(b []byte) (int, error) { return p.in.Write(b) }

// linger is how long the output of a program stays open after the program was ended: what it
// printed before may not have been read yet.
const linger = time.Second

// Close ends the program. Read still returns what the program printed, for a moment.
func (p *pipe) Close() error {
	p.once.Do(func() {
		p.in.Close()
		p.cmd.Process.Kill()
		go p.end()
		time.AfterFunc(linger, func() { p.out.Close() })
	})
	return nil
}

// end collects the program, which has ended or is about to; how is told by what it said.
func (p *pipe) end() { p.ended.Do(func() { p.cmd.Wait() }) }

// Pipes have no addresses and no deadlines that anybody here would ask for.
func (p *pipe) LocalAddr() net.Addr              { return pipeAddr{} }
func (p *pipe) RemoteAddr() net.Addr             { return pipeAddr{} }
func (p *pipe) SetDeadline(time.Time) error      { return nil }
func (p *pipe) SetReadDeadline(time.Time) error  { return nil }
func (p *pipe) SetWriteDeadline(time.Time) error { return nil }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "ssh" }

// tail keeps the end of what is written to it.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(b []byte) (int, error) {
	const most = 1024
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, b...)
	if len(t.b) > most {
		t.b = t.b[len(t.b)-most:]
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.b))
}

// quote makes one word of s for a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
