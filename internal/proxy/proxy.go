// SPDX-License-Identifier: Apache-2.0

// Package proxy reads the proxy settings of this host's environment, and says what guests
// of a lab get of them.
package proxy

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// The variables of servers, in the order in which they are told. Each has a form in
// capitals too, and so has noProxy.
var servers = []string{"http_proxy", "https_proxy", "ftp_proxy", "all_proxy"}

const noProxy = "no_proxy"

// defaultPorts are the schemes of proxies, with the port of one that names none.
var defaultPorts = map[string]uint16{
	"http": 80, "https": 443, "socks": 1080, "socks4": 1080, "socks4a": 1080, "socks5": 1080, "socks5h": 1080,
}

// Settings are the proxy settings of an environment. Values of servers may hold passwords:
// what is printed of Settings has none.
type Settings struct {
	servers []server
	bypass  []string // what needs no proxy, in the order of no_proxy
}

// server is a proxy.
type server struct {
	variable string // in lower case
	found    string // the variable as it was found
	scheme   string
	login    string // "user:password@" as in a URL, or empty
	host     string // without brackets
	port     uint16
	slash    string // "/" if there is one behind the port
}

// EnvError says that a variable of the environment cannot be understood. It does not hold
// the value, which may have a password.
type EnvError struct {
	Variable string // as it was found
	Problem  string
}

// Error implements error.
func (e *EnvError) Error() string {
	return fmt.Sprintf("the environment variable %s %s", e.Variable, e.Problem)
}

// Hint is the next step.
func (e *EnvError) Hint() string {
	return fmt.Sprintf("correct %s or unset it; without \"proxy: inherit\" in the Labfile it is not looked at", e.Variable)
}

// FromEnv reads the settings of the environment. Of a variable in both forms the one in
// lower case counts, unless it is empty. Without a proxy, no_proxy is not read. The error
// joins an *EnvError for each variable that cannot be understood.
func FromEnv(getenv func(string) string) (Settings, error) {
	var (
		s    Settings
		errs envErrors
	)
	find := func(name string) (variable, value string) {
		for _, n := range []string{name, strings.ToUpper(name)} {
			if v := strings.TrimSpace(getenv(n)); v != "" {
				return n, v
			}
		}
		return "", ""
	}
	for _, name := range servers {
		variable, value := find(name)
		if value == "" {
			continue
		}
		srv, problem := parse(value)
		if problem != "" {
			errs = append(errs, &EnvError{Variable: variable, Problem: problem})
			continue
		}
		srv.variable, srv.found = name, variable
		s.servers = append(s.servers, srv)
	}
	if len(s.servers) > 0 {
		variable, value := find(noProxy)
		bypass, problem := parseBypass(value)
		if problem != "" {
			errs = append(errs, &EnvError{Variable: variable, Problem: problem})
		}
		s.bypass = bypass
	}
	if len(errs) > 0 {
		return Settings{}, errs
	}
	return s, nil
}

// envErrors are several errors, told as one.
type envErrors []*EnvError

// Error implements error.
func (e envErrors) Error() string {
	var b strings.Builder
	for i, one := range e {
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(one.Error())
	}
	return b.String()
}

// Unwrap returns the errors.
func (e envErrors) Unwrap() []error {
	out := make([]error, len(e))
	for i, one := range e {
		out[i] = one
	}
	return out
}

// parseBypass reads the value of no_proxy. Like curl, it takes no offence at an entry that
// fits no host: such an entry is left out. A user name or password is a problem, which the
// message names by the number of its entry, from 1.
func parseBypass(value string) (entries []string, problem string) {
	fields := strings.FieldsFunc(value, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' })
	for i, entry := range fields {
		switch {
		case strings.Contains(entry, "@"):
			return nil, fmt.Sprintf("has a user name or password in entry %d; it is a list of names, addresses and networks", i+1)
		case strings.Contains(entry, "://"), strings.ContainsFunc(entry, odd):
		default:
			entries = append(entries, entry)
		}
	}
	return entries, ""
}

// odd reports whether a character does not belong into names, addresses, networks and
// patterns. What is left needs no quotes in a shell's assignment, in /etc/environment or in systemd's files.
func odd(r rune) bool {
	return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-:/*[]", r))
}

const notURL = "is not the URL of a proxy, such as http://proxy.example.com:3128"

// parse reads the URL of a proxy. The problem, if there is one, does not repeat it.
func parse(value string) (s server, problem string) {
	if !strings.Contains(value, "://") {
		value = "http://" + value
	}
	u, err := url.Parse(value)
	if err != nil || u.Opaque != "" {
		return s, notURL + "; special characters of a password are written as %XX"
	}
	s.scheme = strings.ToLower(u.Scheme)
	port, known := defaultPorts[s.scheme]
	switch {
	case !known:
		return s, "does not begin with http://, https://, socks4://, socks4a://, socks5:// or socks5h://"
	case u.Hostname() == "":
		return s, notURL + "; it names no host"
	case u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return s, notURL + "; there is something behind the port"
	case strings.ContainsFunc(u.Hostname(), func(r rune) bool { return odd(r) || strings.ContainsRune("/*[]", r) }):
		return s, notURL + "; its host is no name and no address"
	}
	s.port = port
	if p := u.Port(); p != "" {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return s, notURL + "; its port is not a number from 1 to 65535"
		}
		s.port = uint16(n)
	}
	s.host, s.slash = strings.ToLower(u.Hostname()), u.Path
	if u.User != nil {
		s.login = escape(u.User.Username())
		if password, ok := u.User.Password(); ok {
			s.login += ":" + escape(password)
		}
		s.login += "@"
	}
	return s, ""
}

// escape writes a user name or password with nothing in it but what every shell and every
// file of settings takes literally.
func escape(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("._~-", c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// url is the URL of the proxy at another host and port.
func (s server) url(login, host string, port uint16) string {
	return s.scheme + "://" + login + net.JoinHostPort(host, strconv.Itoa(int(port))) + s.slash
}

// redacted is the server's URL without its user and password.
func (s server) redacted() string {
	login := s.login
	if login != "" {
		login = "***@"
	}
	return s.url(login, s.host, s.port)
}

// loopback reports whether the proxy listens on this host alone.
func (s server) loopback() bool {
	addr, err := netip.ParseAddr(s.host)
	return err == nil && addr.Unmap().IsLoopback() || s.localhost()
}

// localhost reports whether the proxy has a name of the loopback (RFC 6761, section 6.3).
func (s server) localhost() bool {
	return s.host == "localhost" || strings.HasSuffix(s.host, ".localhost")
}

// dials are the addresses at which this host reaches the proxy.
func (s server) dials() []string {
	hosts := []string{s.host}
	if s.localhost() {
		hosts = []string{"127.0.0.1", "::1"}
	}
	out := make([]string, len(hosts))
	for i, h := range hosts {
		out[i] = net.JoinHostPort(h, strconv.Itoa(int(s.port)))
	}
	return out
}

// Empty reports whether there is no proxy. What no_proxy says means nothing then.
func (s Settings) Empty() bool { return len(s.servers) == 0 }

// Redacted are the settings as NAME=VALUE, without users and passwords, to be shown.
func (s Settings) Redacted() []string {
	var out []string
	for _, srv := range s.servers {
		out = append(out, srv.variable+"="+srv.redacted())
	}
	if len(out) > 0 && len(s.bypass) > 0 {
		out = append(out, noProxy+"="+strings.Join(s.bypass, ","))
	}
	return out
}

// String implements fmt.Stringer.
func (s Settings) String() string { return strings.Join(s.Redacted(), " ") }

// GoString implements fmt.GoStringer.
func (s Settings) GoString() string { return s.String() }

// LogValue implements slog.LogValuer.
func (s Settings) LogValue() slog.Value { return slog.StringValue(s.String()) }
