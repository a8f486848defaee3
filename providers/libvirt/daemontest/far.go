// SPDX-License-Identifier: Apache-2.0

package daemontest

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// Far is a system's daemon as one of another host: in a network of its own, of which
// nothing can be reached but libvirt's port for TLS and an ssh server.
type Far struct {
	*Daemon
	TLS  string // host:port, on loopback here
	SSH  string // host:port, on loopback here
	PKI  string // directory of a client's certificates
	Key  string // file of the private key by which ssh lets in as root
	Host string // the line of a known_hosts file
}

// Ports within the daemon's network.
const (
	portTLS = "16514"
	portSSH = "22"
)

// sshdVariable tells the keeper which configuration to start an ssh server with.
const sshdVariable = "LAB_TEST_LIBVIRT_SSHD"

// StartFar starts one, with a storage pool. Only root can do that; for others the test is
// skipped.
func StartFar(t testing.TB) *Far {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can run a system's libvirt")
	}
	dir, err := os.MkdirTemp("/tmp", "labv-keys-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f := &Far{PKI: filepath.Join(dir, "pki"), Key: filepath.Join(dir, "id")}
	if err := errors.Join(os.Chmod(dir, 0o755), certify(dir, f.PKI), f.sshKeys(dir)); err != nil {
		t.Fatal(err)
	}
	f.Daemon = start(t, options{system: true, listen: true, sshd: filepath.Join(dir, "sshd_config"), lines: []string{
		"listen_tls = 1", "listen_tcp = 0", `listen_addr = "127.0.0.1"`, fmt.Sprintf("tls_port = %q", portTLS), `auth_tls = "none"`,
		fmt.Sprintf("ca_file = %q", filepath.Join(f.PKI, "cacert.pem")),
		fmt.Sprintf("cert_file = %q", filepath.Join(dir, "servercert.pem")),
		fmt.Sprintf("key_file = %q", filepath.Join(dir, "serverkey.pem")),
	}})
	f.MakePool("/var/lib/libvirt/images")
	f.TLS, f.SSH = f.wire(portTLS), f.wire(portSSH)
	host, port, err := net.SplitHostPort(f.SSH)
	if err != nil {
		t.Fatal(err)
	}
	f.Host = fmt.Sprintf("[%s]:%s %s", host, port, f.Host)
	return f
}

// Volumes returns the files of the pool. Those that libvirt does not know count too.
func (f *Far) Volumes() []string {
	f.t.Helper()
	entries, err := os.ReadDir(filepath.Join(f.Home, "lib", "libvirt", "images"))
	if err != nil {
		f.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// wire makes a port of the daemon's network one of loopback here.
func (f *Far) wire(port string) string {
	f.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer near.Close()
				far, err := dialIn(f.keeper.Process.Pid, "127.0.0.1:"+port)
				if err != nil {
					return // whoever called finds the connection closed
				}
				defer far.Close()
				go func() {
					defer far.Close()
					io.Copy(far, near)
				}()
				io.Copy(near, far)
			}()
		}
	}()
	return l.Addr().String()
}

// dialIn connects to an address in the network namespace of a process.
func dialIn(pid int, address string) (net.Conn, error) {
	type dialed struct {
		conn net.Conn
		err  error
	}
	done := make(chan dialed)
	go func() {
		// The thread ends with this goroutine: nobody else may find itself there.
		runtime.LockOSThread()
		var d dialed
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
			ns.Close()
		}
		if d.err = err; err == nil {
			d.conn, d.err = net.DialTimeout("tcp", address, time.Minute)
		}
		done <- d
	}()
	d := <-done
	return d.conn, d.err
}

// loopbackUp makes the loopback of this process's network work.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// sshKeys makes a key for each side and the server's configuration.
func (f *Far) sshKeys(dir string) error {
	write := func(name string) (ssh.PublicKey, error) {
		public, private, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, err
		}
		block, err := ssh.MarshalPrivateKey(private, "")
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			return nil, err
		}
		return ssh.NewPublicKey(public)
	}
	client, err := write("id")
	if err != nil {
		return err
	}
	host, err := write("host")
	if err != nil {
		return err
	}
	f.Host = string(bytes.TrimSpace(ssh.MarshalAuthorizedKey(host)))
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "authorized_keys"), ssh.MarshalAuthorizedKey(client), 0o600),
		os.WriteFile(filepath.Join(dir, "sshd_config"), fmt.Appendf(nil, `ListenAddress 127.0.0.1:%s
HostKey %[2]s/host
AuthorizedKeysFile %[2]s/authorized_keys
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
`, portSSH, dir), 0o600))
}

// certify makes an authority, and of it certificates for both sides: the server's in dir,
// the client's in pki (https://libvirt.org/kbase/tlscerts.html).
func certify(dir, pki string) error {
	if err := os.Mkdir(pki, 0o755); err != nil {
		return err
	}
	template := func(name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name, Organization: []string{"lab tests"}},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature,
		}
	}
	save := func(path, kind string, der []byte, mode os.FileMode) error {
		return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode)
	}
	authority := template("authority")
	authority.IsCA, authority.BasicConstraintsValid, authority.KeyUsage = true, true, x509.KeyUsageCertSign
	public, signer, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificate(rand.Reader, authority, authority, public, signer)
	if err != nil {
		return err
	}
	if err := save(filepath.Join(pki, "cacert.pem"), "CERTIFICATE", der, 0o644); err != nil {
		return err
	}
	for _, side := range []struct {
		name, dir string
		usage     x509.ExtKeyUsage
	}{{"server", dir, x509.ExtKeyUsageServerAuth}, {"client", pki, x509.ExtKeyUsageClientAuth}} {
		c := template("localhost")
		c.KeyUsage |= x509.KeyUsageKeyEncipherment // libvirtd asks for it, whatever the key
		c.IPAddresses, c.ExtKeyUsage = []net.IP{net.IPv4(127, 0, 0, 1)}, []x509.ExtKeyUsage{side.usage}
		public, private, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return err
		}
		der, err := x509.CreateCertificate(rand.Reader, c, authority, public, signer)
		if err != nil {
			return err
		}
		key, err := x509.MarshalPKCS8PrivateKey(private)
		if err != nil {
			return err
		}
		// The key is for the tests of every user to read.
		err = errors.Join(save(filepath.Join(side.dir, side.name+"cert.pem"), "CERTIFICATE", der, 0o644),
			save(filepath.Join(side.dir, side.name+"key.pem"), "PRIVATE KEY", key, 0o644))
		if err != nil {
			return err
		}
	}
	return nil
}
