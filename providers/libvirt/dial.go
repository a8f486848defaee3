// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/providers/local"
)

// libvirt's ports (IANA).
const (
	portTCP = "16509"
	portTLS = "16514"
)

// dial opens the transport. started says that it had to start the daemon.
func (k *link) dial(ctx context.Context, wake bool) (c net.Conn, started bool, err error) {
	a := k.addr
	switch a.transport {
	case viaUnix:
		return k.dialUnix(ctx, wake)
	case viaSSH:
		c, err = k.dialSSH()
		return c, false, err
	}
	c, err = k.dialNet(ctx)
	return c, false, err
}

// dialNet connects to the daemon of another host.
func (k *link) dialNet(ctx context.Context) (net.Conn, error) {
	a := k.addr
	limited, cancel := context.WithTimeout(ctx, k.hung)
	defer cancel()
	fail := func(err error, cure string) (net.Conn, error) {
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case limited.Err() != nil:
			return nil, &errHung{where: a.uri, limit: k.hung}
		}
		return nil, &errAbsent{where: a.uri, err: err, cure: cure}
	}
	port := portTCP
	if a.transport == viaTLS {
		port = portTLS
	}
	if a.port != "" {
		port = a.port
	}
	c, err := (&net.Dialer{}).DialContext(limited, "tcp", net.JoinHostPort(a.host, port))
	if err != nil {
		return fail(plain(err), "")
	}
	if a.transport == viaTLS {
		secure, err := k.handshake(limited, c)
		if err != nil {
			c.Close()
			return fail(err, "see https://libvirt.org/kbase/tlscerts.html for the certificates")
		}
		return secure, nil
	}
	return c, nil
}

// dialUnix connects to the daemon of this host.
func (k *link) dialUnix(ctx context.Context, wake bool) (c net.Conn, started bool, err error) {
	paths := k.addr.sockets(k.runtime())
	if c, err = tryUnix(ctx, paths); err == nil || ctx.Err() != nil {
		return c, false, err
	}
	if !errors.Is(err, unix.ECONNREFUSED) && !local.Gone(err) || !k.addr.session || os.Geteuid() == 0 || k.addr.socket != "" || !wake {
		return nil, false, &errAbsent{where: k.where(), err: plain(err), cure: k.cure(err)}
	}
	c, err = k.spawn(ctx, paths)
	return c, true, err
}

// tryUnix connects to the first of the sockets at which somebody listens.
func tryUnix(ctx context.Context, paths []string) (net.Conn, error) {
	var first error
	for _, path := range paths {
		c, err := local.Dial(ctx, path)
		if err == nil {
			return c, nil
		}
		if first == nil || !local.Gone(err) { // a socket that is there says more than one that is not
			first = err
		}
	}
	return nil, first
}

// plain drops the address that the error of a net.Dialer names.
func plain(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	var call *os.SyscallError
	if errors.As(err, &call) {
		err = call.Err
	}
	return err
}

// cure says what helps against an error of a socket of this host.
func (k *link) cure(err error) string {
	switch {
	case errors.Is(err, os.ErrPermission):
		return "join the group that may use it (sudo usermod -aG libvirt $USER, then log in again), or use qemu:///session"
	case k.addr.session && os.Geteuid() != 0:
		return "start libvirtd or virtqemud, or leave socket= out to have that done"
	case k.addr.session && k.addr.socket == "":
		return "root has no session of libvirt's: run lab as an ordinary user, or use qemu:///system"
	}
	return "start the daemon (sudo systemctl start libvirtd), or use qemu:///session"
}

// A daemon of a session starts in a moment and ends by itself when nobody needs it:
// as libvirt's own client starts it.
const idleSeconds = "120"

// daemons are the programs that serve a session, by the socket that they make.
var daemons = []struct{ program, socket string }{
	{"virtqemud", "virtqemud-sock"}, {"libvirtd", "libvirt-sock"},
}

// spawn starts the calling user's daemon and connects to it. Two that are started
// at once are no harm: the second finds that out and ends.
func (k *link) spawn(ctx context.Context, paths []string) (net.Conn, error) {
	program, err := findDaemon()
	if err != nil {
		return nil, &errAbsent{where: k.where(), err: err, cure: installCure()}
	}
	if err := os.MkdirAll(filepath.Dir(paths[0]), 0o700); err != nil {
		return nil, err
	}
	cmd := exec.Command(program, "--timeout="+idleSeconds)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	k.log.Debug("starting the session's daemon", "program", program)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", program, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	ctx, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	for {
		c, err := tryUnix(ctx, paths)
		if err == nil {
			return c, nil
		}
		select {
		case <-ended:
			// Another one may have been faster.
			if c, err := tryUnix(ctx, paths); err == nil {
				return c, nil
			}
			return nil, &errAbsent{where: k.where(), err: fmt.Errorf("%s ended at once", program), cure: "run it in a terminal to see why"}
		default:
		}
		if pause(ctx, retry) != nil {
			return nil, &errAbsent{where: k.where(), err: err, cure: fmt.Sprintf("%s was started and did not come up", program)}
		}
	}
}

// findDaemon looks for a daemon's program: administrators' directories are not in
// every user's PATH.
func findDaemon() (string, error) {
	for _, d := range daemons {
		if path, err := exec.LookPath(d.program); err == nil {
			return path, nil
		}
		for _, dir := range []string{"/usr/sbin", "/usr/local/sbin"} {
			if path := filepath.Join(dir, d.program); exists(path) {
				return path, nil
			}
		}
	}
	return "", errors.New("neither virtqemud nor libvirtd is installed")
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// runtimeDir is g_get_user_runtime_dir(3): XDG_RUNTIME_DIR or else the cache.
func runtimeDir(env func(string) string) string {
	if dir := env("XDG_RUNTIME_DIR"); dir != "" {
		return dir
	}
	return cacheDir(env)
}

func cacheDir(env func(string) string) string {
	if dir := env("XDG_CACHE_HOME"); dir != "" {
		return dir
	}
	return filepath.Join(env("HOME"), ".cache")
}

// dialSSH has the user's ssh, with all that its configuration says, run the program
// that connects to the daemon's socket on the other host.
func (k *link) dialSSH() (net.Conn, error) {
	cmd := exec.Command("ssh", k.addr.sshArgs()...)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, theirs, err := os.Pipe() // not StdoutPipe, which the end of the program closes
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	cmd.Stdout = theirs
	said := &tail{}
	cmd.Stderr = said
	cmd.WaitDelay = linger                               // a child of it may hold stderr open
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is lab's
	if err := cmd.Start(); err != nil {
		out.Close()
		return nil, fmt.Errorf("running ssh: %w", err)
	}
	return &pipe{cmd: cmd, in: in, out: out, said: said}, nil
}

// sshArgs is what ssh is called with. Nobody is there to answer a question.
func (a address) sshArgs() []string {
	args := []string{
		"-T", "-e", "none", "-o", "BatchMode=yes",
		"-o", "ControlMaster=no", // it ends with this connection, and would end those of others
		"-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3",
	}
	if a.port != "" {
		args = append(args, "-p", a.port)
	}
	if a.user != "" {
		args = append(args, "-l", a.user)
	}
	if a.keyfile != "" {
		args = append(args, "-i", a.keyfile)
	}
	return append(args, "--", a.host, "sh -c "+quote(a.helper())) // whatever shell the account has
}

// sshTry is the command by which a user finds out whether it is ssh, or the shell at the
// other end, that keeps lab from libvirt.
func (a address) sshTry() string {
	words := []string{"ssh", "-T"}
	if a.port != "" {
		words = append(words, "-p", a.port)
	}
	if a.keyfile != "" {
		words = append(words, "-i", quote(a.keyfile))
	}
	to := a.host
	if a.user != "" {
		to = a.user + "@" + to
	}
	return strings.Join(append(words, to, "true"), " ")
}

// helper is the command for the other host's shell. virt-ssh-helper comes with
// libvirt, finds the socket and starts a session's daemon; without it, or for a
// socket of the user's choice, there is netcat.
func (a address) helper() string {
	nc := "nc"
	if a.netcat != "" {
		nc = quote(a.netcat)
	}
	if a.socket != "" {
		return nc + " -U " + quote(a.socket)
	}
	fallback := nc + " -U /run/libvirt/libvirt-sock"
	if a.session {
		fallback = nc + ` -U "${XDG_RUNTIME_DIR:-$HOME/.cache}/libvirt/libvirt-sock"`
	}
	if a.netcat != "" {
		return fallback
	}
	return fmt.Sprintf("if command -v virt-ssh-helper >/dev/null; then exec virt-ssh-helper %s; else exec %s; fi", quote(a.driver()), fallback)
}

// tlsFiles is where the certificates lie (https://libvirt.org/kbase/tlscerts.html).
type tlsFiles struct{ ca, cert, key string }

func (k *link) certificates() []tlsFiles {
	in := func(dir string) tlsFiles {
		return tlsFiles{filepath.Join(dir, "cacert.pem"), filepath.Join(dir, "clientcert.pem"), filepath.Join(dir, "clientkey.pem")}
	}
	if k.addr.pki != "" {
		return []tlsFiles{in(k.addr.pki)}
	}
	files := []tlsFiles{{"/etc/pki/CA/cacert.pem", "/etc/pki/libvirt/clientcert.pem", "/etc/pki/libvirt/private/clientkey.pem"}}
	home := k.env("HOME")
	if u, err := user.Current(); home == "" && err == nil {
		home = u.HomeDir
	}
	if home != "" {
		files = append([]tlsFiles{in(filepath.Join(home, ".pki", "libvirt"))}, files...)
	}
	return files
}

// handshake makes a connection one of TLS, in which both sides have shown their
// certificates, and waits for the byte by which libvirt says that it is content.
func (k *link) handshake(ctx context.Context, raw net.Conn) (net.Conn, error) {
	cfg, err := k.tlsConfig()
	if err != nil {
		return nil, err
	}
	c := tls.Client(raw, cfg)
	if err := c.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	if until, ok := ctx.Deadline(); ok {
		c.SetReadDeadline(until)
	}
	var content [1]byte
	if _, err := io.ReadFull(c, content[:]); err != nil || content[0] != 1 {
		return nil, errors.New("the other side does not accept this host's certificate")
	}
	c.SetReadDeadline(time.Time{})
	return c, nil
}

func (k *link) tlsConfig() (*tls.Config, error) {
	var first error
	for _, f := range k.certificates() {
		pair, err := tls.LoadX509KeyPair(f.cert, f.key)
		var ca []byte
		if err == nil {
			ca, err = os.ReadFile(f.ca)
		}
		if err != nil {
			if first == nil {
				first = err
			}
			continue
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(ca) {
			return nil, fmt.Errorf("%s holds no certificate", f.ca)
		}
		return &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: roots, ServerName: k.addr.host, MinVersion: tls.VersionTLS12}, nil
	}
	return nil, first
}
