// SPDX-License-Identifier: Apache-2.0

//go:build linux

package sshd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/guest/filestream"
)

// session is one "session" channel: one command, shell or file transfer.
type session struct {
	Config
	acc  account
	conn ssh.Conn
	ch   ssh.Channel
	log  *slog.Logger

	env   []string
	unset []string // names in /etc/environment that do not hold
	pty   *ptyRequest
	agent *agent // nil unless the client forwards its own

	started bool
	replied chan struct{} // closed once the client knows that something was started
	once    sync.Once

	proc    *process
	stdin   io.Closer
	outputs []output
	master  *os.File // of the terminal, if there is one
}

// maxEnv bounds what a client may set, in variables.
const maxEnv = 1000

// serve handles the requests of the channel until it is closed, by the end of the
// process or by the client. A process that the client leaves behind gets SIGHUP, as
// if its terminal had been hung up; whoever wants it to live on uses nohup.
func (s *session) serve(ctx context.Context, reqs <-chan *ssh.Request) {
	defer s.ch.Close()
	ctx, cancel := context.WithCancel(ctx)
	var agents sync.WaitGroup
	defer agents.Wait()
	defer func() {
		cancel()
		if s.agent != nil {
			s.agent.Close()
		}
	}()
	for req := range reqs {
		ok := s.request(req)
		if ok && req.Type == requestAgent {
			agents.Go(func() { s.agent.serve(ctx, s.conn) })
		}
		if req.WantReply {
			_ = req.Reply(ok, nil)
		}
		if s.started {
			s.once.Do(func() { close(s.replied) })
		}
	}
	if s.proc != nil {
		if s.proc.signal(unix.SIGHUP) {
			s.proc.signal(unix.SIGCONT) // a stopped one would not notice
		}
		// One that does not mind lives on, unheard.
		s.stdin.Close()
		for _, o := range s.outputs {
			o.from.Close()
		}
	}
}

// requestAgent asks for the client's ssh agent in the guest.
const requestAgent = "auth-agent-req@openssh.com"

func (s *session) request(req *ssh.Request) bool {
	switch req.Type {
	case "env":
		var v struct{ Name, Value string }
		if ssh.Unmarshal(req.Payload, &v) != nil || s.started || len(s.env) >= maxEnv || strings.ContainsAny(v.Name, "=\x00") || strings.Contains(v.Value, "\x00") {
			return false
		}
		if v.Name == agentapi.UnsetVariable {
			s.unset = strings.Fields(v.Value)
			return true
		}
		s.env = append(s.env, v.Name+"="+v.Value)
		return true
	case requestAgent:
		if s.started || s.agent != nil {
			return false
		}
		var err error
		if s.agent, err = newAgent(s.acc); err != nil {
			s.log.Info("forwarding the client's ssh agent", "error", err)
			return false
		}
		return true
	case "pty-req":
		var p ptyRequest
		if ssh.Unmarshal(req.Payload, &p) != nil || s.started {
			return false
		}
		s.pty = &p
		return true
	case "window-change":
		var w windowChange
		return ssh.Unmarshal(req.Payload, &w) == nil && s.master != nil && resize(s.master, w) == nil
	case "signal":
		var v struct{ Name string }
		if ssh.Unmarshal(req.Payload, &v) != nil || s.proc == nil {
			return false
		}
		sig := unix.SignalNum("SIG" + v.Name)
		return sig != 0 && s.proc.signal(sig)
	case "shell":
		return s.start(nil)
	case "exec":
		var v struct{ Command string }
		return ssh.Unmarshal(req.Payload, &v) == nil && s.start([]string{s.acc.shell, "-c", v.Command})
	case "subsystem":
		var v struct{ Name string }
		if ssh.Unmarshal(req.Payload, &v) != nil {
			return false
		}
		argv := map[string][]string{"sftp": s.SFTP, filestream.Subsystem: s.Files}[v.Name]
		return len(argv) > 0 && s.start(argv)
	}
	return false
}

// directory is where the session begins: the user's home, if it is there.
func (s *session) directory() string {
	if fi, err := os.Stat(s.acc.home); err == nil && fi.IsDir() {
		return s.acc.home
	}
	return "/"
}

// start runs argv, or a login shell if argv is empty. That something could not be
// started is told to the user in the way of a shell: on the error output, with exit
// code 127.
func (s *session) start(argv []string) bool {
	if s.started {
		return false
	}
	cmd := &exec.Cmd{Path: s.acc.shell, Args: []string{"-" + filepath.Base(s.acc.shell)}}
	if len(argv) > 0 {
		cmd.Path, cmd.Args = argv[0], argv
	}
	cmd.Dir = s.directory()
	cmd.Env = s.acc.env()
	for _, v := range environment(s.etc()) {
		if name, _, _ := strings.Cut(v, "="); !slices.Contains(s.unset, name) {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: s.acc.credential()}

	s.started, s.replied = true, make(chan struct{})
	var err error
	var outputs []output
	var stdin io.WriteCloser
	if s.pty != nil {
		stdin, outputs, err = s.terminal(cmd)
	} else {
		stdin, outputs, err = s.pipes(cmd)
	}
	cmd.Env = append(cmd.Env, s.env...)
	if s.agent != nil {
		cmd.Env = append(cmd.Env, "SSH_AUTH_SOCK="+s.agent.Addr().String())
	}
	if err == nil {
		err = cmd.Start()
	}
	for _, f := range []any{cmd.Stdin, cmd.Stdout, cmd.Stderr} {
		// The child's ends; for a terminal they are one and the same.
		if f, ok := f.(*os.File); ok {
			f.Close()
		}
	}
	if err != nil {
		for _, o := range outputs {
			o.from.Close()
		}
		if stdin != nil {
			stdin.Close()
		}
		s.log.Info("starting a process", "argv", cmd.Args, "error", err)
		go func() {
			fmt.Fprintf(s.ch.Stderr(), "lab-agent: %v\n", err)
			s.exit(127, nil)
		}()
		return true
	}
	s.proc, s.stdin, s.outputs = &process{cmd: cmd}, stdin, outputs
	// The agent may be spared when memory runs out; what it starts is not. Without
	// the right to say so there was nothing to take back.
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", cmd.Process.Pid), []byte("0"), 0)
	go func() {
		_, _ = io.Copy(stdin, s.ch)
		// A terminal has one file for both directions: closing it hangs up.
		if s.pty == nil {
			stdin.Close()
		}
	}()
	go s.wait()
	return true
}

// output is one stream from a process to the client.
type output struct {
	from *os.File
	to   io.Writer
}

func (s *session) pipes(cmd *exec.Cmd) (stdin io.WriteCloser, outs []output, err error) {
	inR, inW, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	cmd.Stdin = inR
	for _, o := range []struct {
		to   io.Writer
		dest *io.Writer
	}{{s.ch, &cmd.Stdout}, {s.ch.Stderr(), &cmd.Stderr}} {
		r, w, err := os.Pipe()
		if err != nil {
			return inW, outs, err
		}
		*o.dest = w
		outs = append(outs, output{r, o.to})
	}
	return inW, outs, nil
}

func (s *session) terminal(cmd *exec.Cmd) (stdin io.WriteCloser, outs []output, err error) {
	master, tty, err := openPTY()
	if err != nil {
		return nil, nil, err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr.Setctty = true // Ctty 0: the child's standard input
	cmd.Env = append(cmd.Env, "TERM="+s.pty.Term)
	if c := s.acc.credential(); c != nil {
		if err := tty.Chown(int(c.Uid), -1); err != nil {
			return master, nil, err
		}
	}
	if err := setModes(tty, s.pty.Modes); err != nil {
		return master, nil, err
	}
	if err := resize(master, windowChange{s.pty.Columns, s.pty.Rows, s.pty.Width, s.pty.Height}); err != nil {
		return master, nil, err
	}
	s.master = master
	return master, []output{{master, s.ch}}, nil
}

// linger is how long an output must be silent, once the process has ended, until it
// is given up. A daemon that was started in the background may hold it open for
// ever; OpenSSH would wait for that, and users wonder why.
const linger = 200 * time.Millisecond

// wait moves the output, and reports how the process ended.
func (s *session) wait() {
	defer s.stdin.Close()
	exited := make(chan struct{})
	var wg sync.WaitGroup
	for _, o := range s.outputs {
		wg.Go(func() {
			defer o.from.Close()
			move(o, exited)
		})
	}
	err := s.proc.wait()
	close(exited)
	for _, o := range s.outputs {
		_ = o.from.SetReadDeadline(time.Now().Add(linger))
	}
	wg.Wait()
	s.exit(0, err)
}

func move(o output, exited <-chan struct{}) {
	buf := make([]byte, 32<<10)
	for {
		n, err := o.from.Read(buf)
		if n > 0 {
			if _, err := o.to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return // EOF, EIO of a terminal without a process, or the deadline
		}
		select {
		case <-exited:
			_ = o.from.SetReadDeadline(time.Now().Add(linger))
		default:
		}
	}
}

// exit tells the client how the session ended, and closes it: not before the client
// was told that it began, or it would take the end for a failure to begin.
func (s *session) exit(code uint32, err error) {
	<-s.replied
	var ee *exec.ExitError
	switch {
	case errors.As(err, &ee):
		ws := ee.Sys().(syscall.WaitStatus)
		if ws.Signaled() {
			v := struct {
				Name    string
				Core    bool
				Message string
				Lang    string
			}{Name: strings.TrimPrefix(unix.SignalName(ws.Signal()), "SIG"), Core: ws.CoreDump(), Message: ws.Signal().String()}
			_, _ = s.ch.SendRequest("exit-signal", false, ssh.Marshal(v))
			s.ch.Close()
			return
		}
		code = uint32(ws.ExitStatus())
	case err != nil:
		code = 255
	}
	_, _ = s.ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{code}))
	s.ch.Close()
}

// process is a running command that can be signalled, with all of its process
// group, for as long as its number is its own.
type process struct {
	cmd *exec.Cmd
	mu  sync.Mutex
	end bool
}

func (p *process) signal(sig syscall.Signal) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.end && unix.Kill(-p.cmd.Process.Pid, sig) == nil
}

func (p *process) wait() error {
	// Once the process is reaped, its number may be another's.
	for {
		err := unix.Waitid(unix.P_PID, p.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if err != unix.EINTR {
			break
		}
	}
	p.mu.Lock()
	p.end = true
	p.mu.Unlock()
	return p.cmd.Wait()
}

// ServeSFTP serves sftp over a program's standard input and output: what Config.SFTP
// runs. It is a program of its own because it runs as the user, with a working
// directory that relative paths begin in.
func ServeSFTP(stdin io.Reader, stdout io.WriteCloser) error {
	srv, err := sftp.NewServer(struct {
		io.Reader
		io.WriteCloser
	}{stdin, stdout})
	if err != nil {
		return err
	}
	if err := srv.Serve(); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}
