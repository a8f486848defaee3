// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// DefaultURI is the connection of a lab that names none: the calling user's own
// daemon, which needs no root.
const DefaultURI = "qemu:///session"

// A connection URI is libvirt's: qemu[+TRANSPORT]://[USER@][HOST][:PORT]/PATH[?PARAMETERS].
// https://libvirt.org/uri.html

// The transports.
const (
	viaUnix = "unix"
	viaTCP  = "tcp"
	viaTLS  = "tls"
	viaSSH  = "ssh"
)

// address is a connection URI, taken apart.
type address struct {
	uri       string // as the user wrote it
	transport string
	session   bool   // the daemon of a user, not of the system
	user      string // empty for the caller's
	host      string // empty for this host
	port      string // empty for the transport's
	socket    string // path on the daemon's host; empty for where libvirt puts it
	netcat    string // of viaSSH: the program there that connects to the socket; empty for virt-ssh-helper or nc
	keyfile   string // of viaSSH: the private key; empty for what ssh is configured to use
	pki       string // of viaTLS: the directory of the certificates; empty for libvirt's
	pool      string // the storage pool that machines of another host are kept in
	insecure  bool   // of viaTCP: another host, without encryption, is what the user wants
}

// driver is what the daemon is asked to open.
func (a address) driver() string {
	if a.session {
		return "qemu:///session"
	}
	return "qemu:///system"
}

// local reports whether the daemon is one of this host, so that its machines'
// files and processes are here.
func (a address) local() bool { return a.transport == viaUnix }

// plain is the URI for libvirt's own programs, which do not know lab's parameters.
func (a address) plain() string {
	u, err := url.Parse(a.uri)
	if err != nil {
		return a.uri // it was parsed before
	}
	q := u.Query()
	q.Del("pool")
	q.Del("insecure")
	u.RawQuery = q.Encode()
	return u.String()
}

// plainWord is what goes to ssh, and into command lines that are shown: nothing that a
// shell or an option parser would read otherwise.
var plainWord = regexp.MustCompile(`^[A-Za-z0-9_:][A-Za-z0-9_.:%@+-]*$`)

// parameters lists what may stand behind the question mark.
var parameters = []string{"insecure", "keyfile", "netcat", "pkipath", "pool", "socket"}

func parseURI(s string) (address, error) {
	if s == "" {
		s = DefaultURI
	}
	a, err := parse(s)
	if err != nil {
		return address{}, fmt.Errorf("libvirt URI %q: %w", s, err)
	}
	return a, nil
}

func parse(s string) (address, error) {
	u, err := url.Parse(s)
	if err != nil {
		var bad *url.Error
		if errors.As(err, &bad) {
			err = bad.Err
		}
		return address{}, err
	}
	a := address{uri: s, host: u.Hostname(), port: u.Port(), user: u.User.Username()}
	driver, transport, given := strings.Cut(u.Scheme, "+")
	a.transport = transport
	if !given {
		a.transport = viaUnix
		if a.host != "" {
			a.transport = viaTLS // as libvirt reads it
		}
	}
	switch {
	case driver != "qemu":
		return address{}, errors.New(`must begin with "qemu:" or "qemu+", such as qemu:///session: lab runs machines by QEMU`)
	case !slices.Contains([]string{viaUnix, viaTCP, viaTLS, viaSSH}, a.transport):
		return address{}, fmt.Errorf("%q is not a transport; there are unix, ssh, tls and tcp", a.transport)
	case u.Path != "/session" && u.Path != "/system":
		return address{}, fmt.Errorf("the path must be /session or /system, not %q", u.Path)
	case a.transport == viaUnix && a.host != "":
		return address{}, fmt.Errorf("the transport unix stays on this host and cannot reach %q; write qemu+ssh", a.host)
	case a.transport != viaUnix && a.host == "":
		return address{}, fmt.Errorf("the transport %s needs a host, as in qemu+%s://HOST%s", a.transport, a.transport, u.Path)
	case a.user != "" && a.transport != viaSSH:
		return address{}, fmt.Errorf("only the transport ssh has a user, not %s", a.transport)
	}
	for what, word := range map[string]string{"host": a.host, "user": a.user} {
		if word != "" && !plainWord.MatchString(word) {
			return address{}, fmt.Errorf("%q is not the name of a %s", word, what)
		}
	}
	if _, has := u.User.Password(); has {
		return address{}, errors.New("a password does not belong into a URI; let ssh have a key")
	}
	a.session = u.Path == "/session"
	return a, a.read(u.RawQuery)
}

// read takes the parameters.
func (a *address) read(query string) error {
	q, err := url.ParseQuery(query)
	if err != nil {
		return err
	}
	for name, values := range q {
		if !slices.Contains(parameters, name) {
			return fmt.Errorf("unknown parameter %q; there are %s", name, strings.Join(parameters, ", "))
		}
		v := values[len(values)-1]
		switch name {
		case "socket":
			a.socket = v
		case "netcat":
			a.netcat = v
		case "keyfile":
			a.keyfile = v
		case "pkipath":
			a.pki = v
		case "pool":
			if !plainWord.MatchString(v) {
				return fmt.Errorf("%q is not the name of a pool", v)
			}
			a.pool = v
		case "insecure":
			a.insecure = v == "1"
		}
	}
	for what, path := range map[string]string{"socket": a.socket, "keyfile": a.keyfile, "pkipath": a.pki} {
		if path != "" && !filepath.IsAbs(path) {
			return fmt.Errorf("the %s %q is not an absolute path", what, path)
		}
	}
	if a.transport == viaTCP && !a.insecure && !loopback(a.host) {
		return fmt.Errorf("the transport tcp sends everything unencrypted to %s; write qemu+tls or qemu+ssh, or add insecure=1 if that network is yours alone", a.host)
	}
	return nil
}

// loopback reports whether host is this host by its very name: what a resolver says
// may change.
func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// sockets lists where the daemon of this host may listen, the most likely first.
// The modular daemon is preferred, as libvirt's own client does.
func (a address) sockets(runtime string) []string {
	if a.socket != "" {
		return []string{a.socket}
	}
	dir := "/run/libvirt"
	if a.session {
		dir = filepath.Join(runtime, "libvirt")
	}
	return []string{filepath.Join(dir, "virtqemud-sock"), filepath.Join(dir, "libvirt-sock")}
}
