// SPDX-License-Identifier: Apache-2.0

package verify

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
)

// maxOutput is how much is read of an output, a file or an answer, in bytes.
const maxOutput = 1 << 20

// The scripts are POSIX sh and take the test's subject as their only argument. They
// print facts for the parsers of facts.go; ending with another code than 0 means that
// nothing can be said, for the reason on stderr.
const (
	portScript = `case $1 in tcp:*) p=tcp;; *) p=udp;; esac
cat /proc/net/$p; cat /proc/net/${p}6 2>/dev/null || true`

	// What test -e cannot see may be hidden by a folder that must not be searched.
	fileScript = `LC_ALL=C; export LC_ALL
if ! [ -e "$1" ] && ! [ -L "$1" ]; then
  err=$(stat "$1" 2>&1 >/dev/null)
  case $err in *"No such file"*|*"Not a directory"*) echo absent; exit 0;; esac
  echo "$err" >&2; exit 1
fi
stat -c 'stat %f %s %U %u %G %g' "$1" || exit 1
if [ -L "$1" ]; then printf 'link %s\n' "$(readlink "$1")"; fi`

	sumScript      = `[ -e "$1" ] || exit 0; sha256sum < "$1"`
	contentsScript = `[ -e "$1" ] || exit 0; head -c 1048576 < "$1"`

	packageScript = `if command -v dpkg-query >/dev/null 2>&1; then
  dpkg-query -W -f='${Status} ${Version}\n' "$1" 2>/dev/null | sed -n 's/^[^ ]* [^ ]* installed //p'
elif [ -e /lib/apk/db/installed ]; then
  awk -v p="$1" '/^P:/{ok=(substr($0,3)==p)} /^V:/{if(ok)print substr($0,3)}' /lib/apk/db/installed
elif command -v rpm >/dev/null 2>&1 && ls -d /var/lib/rpm /usr/lib/sysimage/rpm >/dev/null 2>&1; then
  rpm -q --qf '%{VERSION}-%{RELEASE}\n' "$1" 2>/dev/null | grep -v 'not installed' || true
else
  echo 'no package manager of the machine is known (dpkg, apk, rpm)' >&2; exit 1
fi`

	serviceScript = `if [ -d /run/systemd/system ]; then
  systemctl is-enabled "$1" >/dev/null 2>&1 && echo enabled
  systemctl is-active "$1" >/dev/null 2>&1 && echo running
elif command -v rc-service >/dev/null 2>&1; then
  ls /etc/runlevels/*/"$1" >/dev/null 2>&1 && echo enabled
  rc-service "$1" status >/dev/null 2>&1 && echo running
else
  for f in /etc/rc?.d/S[0-9][0-9]"$1" /etc/init.d/S[0-9][0-9]"$1"; do [ -e "$f" ] && echo enabled && break; done
  pidof "$1" >/dev/null 2>&1 && echo running
fi
exit 0`

	// One program for all files: under emulation, starting one takes its time.
	processScript = `cat /proc/[0-9]*/comm 2>/dev/null; exit 0`

	userScript = `line=$(if command -v getent >/dev/null 2>&1; then getent passwd "$1"; else awk -F: -v u="$1" '$1==u' /etc/passwd; fi)
[ -n "$line" ] || exit 0
echo "$line"; id -Gn "$1"`

	dnsScript = `if command -v getent >/dev/null 2>&1; then getent ahosts "$1" || true
else echo nslookup; nslookup "$1" 2>/dev/null || true; fi`
)

// gather finds the facts of one test out, once.
func (m *machine) gather(ctx context.Context, t lab.Test) (Facts, error) {
	if t.Kind == lab.TestHTTP {
		way, err := m.open(ctx)
		if err != nil {
			return nil, err
		}
		one, cancel := context.WithTimeout(ctx, t.Timeout)
		defer cancel()
		facts, err := getHTTP(one, way, t)
		return facts, timedOut(one, err, t.Timeout)
	}
	for last := false; ; last = true {
		c, err := m.login(ctx)
		if err != nil {
			return nil, err
		}
		one, cancel := context.WithTimeout(ctx, t.Timeout)
		facts, err := ask(one, c, t)
		if err != nil {
			err = timedOut(one, err, t.Timeout)
		}
		cancel()
		// The login may have ended with a command that another test had to give up.
		if errors.Is(err, guest.ErrDisconnected) {
			m.drop(c)
			if !last {
				continue
			}
		}
		return facts, err
	}
}

// ask finds out, over ssh, what a test wants to know.
func ask(ctx context.Context, c *guest.Client, t lab.Test) (Facts, error) {
	script := func(text string) (string, error) {
		var out, errOut bounded
		err := c.Run(ctx, guest.Command{Args: []string{"sh", "-c", text, "sh", t.Subject}, Stdout: &out, Stderr: &errOut})
		if said := strings.TrimSpace(errOut.String()); err != nil && said != "" {
			return "", fmt.Errorf("%s (%w)", said, err)
		}
		return out.String(), err
	}
	wants := func(attribute string) bool {
		return slices.ContainsFunc(t.Want, func(w lab.Want) bool { return w.Attribute == attribute })
	}
	switch t.Kind {
	case lab.TestRun:
		return runCommand(ctx, c, t.Subject)
	case lab.TestFile:
		out, err := script(fileScript)
		if err != nil {
			return nil, err
		}
		facts, err := parseFile(out)
		if err != nil {
			return nil, err
		}
		if wants("sha256") {
			if out, err = script(sumScript); err != nil {
				return nil, err
			}
			sum, _, _ := strings.Cut(out, " ")
			facts["sha256"] = Fact{Text: sum, None: sum == ""}
		}
		if wants("contents") {
			if out, err = script(contentsScript); err != nil {
				return nil, err
			}
			facts["contents"] = Fact{Text: out, Lines: true, None: facts["exists"].Text == no}
		}
		return facts, nil
	}
	parser := map[lab.TestKind]struct {
		script string
		parse  func(subject, out string) (Facts, error)
	}{
		lab.TestPort:    {portScript, parsePort},
		lab.TestPackage: {packageScript, parsePackage},
		lab.TestService: {serviceScript, parseService},
		lab.TestProcess: {processScript, parseProcess},
		lab.TestUser:    {userScript, parseUser},
		lab.TestDNS:     {dnsScript, parseDNS},
	}
	p, ok := parser[t.Kind]
	if !ok {
		return nil, fmt.Errorf("unknown kind of check: %q", t.Kind)
	}
	out, err := script(p.script)
	if err != nil {
		return nil, err
	}
	return p.parse(t.Subject, out)
}

// runCommand runs a command line in the user's shell. Its exit code is a fact, not
// an error.
func runCommand(ctx context.Context, c *guest.Client, line string) (Facts, error) {
	var out, errOut bounded
	err := c.Run(ctx, guest.Command{Shell: line, Stdout: &out, Stderr: &errOut})
	code := 0
	var exit *guest.ExitError
	switch {
	case errors.As(err, &exit) && exit.Signal != "":
		return nil, errors.New(exit.Error()) // the check's, not one to pass on
	case errors.As(err, &exit):
		code = exit.Code
	case err != nil:
		return nil, err
	}
	return Facts{
		"exit-status": {Text: strconv.Itoa(code), Number: true},
		"stdout":      {Text: out.String(), Lines: true},
		"stderr":      {Text: errOut.String(), Lines: true},
	}, nil
}

// getHTTP asks the machine itself for a URL, whatever host stands in it.
func getHTTP(ctx context.Context, way guest.Target, t lab.Test) (Facts, error) {
	u, err := url.Parse(t.Subject)
	if err != nil {
		return nil, fmt.Errorf("reading the URL: %w", err)
	}
	port := uint16(80)
	if u.Scheme == "https" {
		port = 443
	}
	if p := u.Port(); p != "" {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("reading the URL: %w", err)
		}
		port = uint16(n)
	}
	if way.Port == nil {
		return nil, fmt.Errorf("reaching port %d: %w", port, errors.ErrUnsupported)
	}
	transport := &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return way.Port(ctx, port) },
		DisableKeepAlives:      true,
		MaxResponseHeaderBytes: maxOutput,
		TLSClientConfig:        &tls.Config{InsecureSkipVerify: t.Insecure}, // only where the Labfile says so
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{
		Transport: transport,
		// A redirect is an answer: it may lead anywhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxOutput))
	if err != nil {
		return nil, fmt.Errorf("reading the answer: %w", err)
	}
	var headers []string
	for name, values := range resp.Header {
		for _, v := range values {
			headers = append(headers, name+": "+v)
		}
	}
	slices.Sort(headers)
	return Facts{
		"status":  {Text: strconv.Itoa(resp.StatusCode), Number: true},
		"body":    {Text: string(body), Lines: true},
		"headers": {Text: strings.Join(headers, "\n"), Lines: true},
	}, nil
}

// bounded keeps the first maxOutput bytes of what is written.
type bounded struct{ buf bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	b.buf.Write(p[:min(len(p), maxOutput-b.buf.Len())])
	return len(p), nil
}

func (b *bounded) String() string { return b.buf.String() }
