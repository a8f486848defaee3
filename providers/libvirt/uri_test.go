// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseURI(t *testing.T) {
	for uri, want := range map[string]address{
		"":                          {uri: "qemu:///session", transport: "unix", session: true},
		"qemu:///session":           {uri: "qemu:///session", transport: "unix", session: true},
		"qemu:///system":            {uri: "qemu:///system", transport: "unix"},
		"qemu+unix:///system":       {uri: "qemu+unix:///system", transport: "unix"},
		"qemu:///session?socket=/s": {uri: "qemu:///session?socket=/s", transport: "unix", session: true, socket: "/s"},
		"qemu+tcp://127.0.0.1/system": {
			uri: "qemu+tcp://127.0.0.1/system", transport: "tcp", host: "127.0.0.1",
		},
		"qemu+tcp://[::1]:99/system": {uri: "qemu+tcp://[::1]:99/system", transport: "tcp", host: "::1", port: "99"},
		"qemu+tcp://far/system?insecure=1": {
			uri: "qemu+tcp://far/system?insecure=1", transport: "tcp", host: "far", insecure: true,
		},
		"qemu://far/system": {uri: "qemu://far/system", transport: "tls", host: "far"},
		"qemu+tls://far/system?pkipath=/p": {
			uri: "qemu+tls://far/system?pkipath=/p", transport: "tls", host: "far", pki: "/p",
		},
		"qemu+ssh://ada@far:22/session?netcat=/bin/nc": {
			uri: "qemu+ssh://ada@far:22/session?netcat=/bin/nc", transport: "ssh", session: true,
			user: "ada", host: "far", port: "22", netcat: "/bin/nc",
		},
	} {
		got, err := parseURI(uri)
		if err != nil {
			t.Errorf("%q: %v", uri, err)
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(address{})); diff != "" {
			t.Errorf("%q (-want +got):\n%s", uri, diff)
		}
	}
	for uri, want := range map[string]string{
		"xen:///system":                `must begin with "qemu:" or "qemu+", such as qemu:///session: lab runs machines by QEMU`,
		"session":                      `must begin with "qemu:" or "qemu+", such as qemu:///session: lab runs machines by QEMU`,
		"qemu+carrier://far/system":    `"carrier" is not a transport; there are unix, ssh, tls and tcp`,
		"qemu:///embed":                `the path must be /session or /system, not "/embed"`,
		"qemu+unix://far/system":       `the transport unix stays on this host and cannot reach "far"; write qemu+ssh`,
		"qemu+ssh:///system":           `the transport ssh needs a host, as in qemu+ssh://HOST/system`,
		"qemu+tls://ada@far/system":    `only the transport ssh has a user, not tls`,
		"qemu+ssh://ada:pw@far/system": `a password does not belong into a URI; let ssh have a key`,
		"qemu:///session?mode=direct":  `unknown parameter "mode"; there are insecure, keyfile, netcat, pkipath, pool, socket`,
		"qemu:///session?socket=s":     `the socket "s" is not an absolute path`,
		"qemu:///session%zz":           `invalid URL escape "%zz"`,
		"qemu+tcp://10.0.0.1/system": `the transport tcp sends everything unencrypted to 10.0.0.1; write qemu+tls or qemu+ssh,` +
			` or add insecure=1 if that network is yours alone`,
	} {
		_, err := parseURI(uri)
		if want := `libvirt URI "` + uri + `": ` + want; err == nil || err.Error() != want {
			t.Errorf("got %v\nwant %s", err, want)
		}
	}
}

func TestSSHArguments(t *testing.T) {
	const (
		always = `-T -e none -o BatchMode=yes -o ControlMaster=no -o ServerAliveInterval=5 -o ServerAliveCountMax=3`
		helper = `if command -v virt-ssh-helper >/dev/null; then exec virt-ssh-helper 'qemu:///system'; else exec nc -U /run/libvirt/libvirt-sock; fi`
	)
	for uri, want := range map[string][3]string{ // where to, what for, and how a user tries it
		"qemu+ssh://far/system": {` -- far`, helper, "far"},
		"qemu+ssh://ada@far:2222/session?netcat=/opt/nc": {
			` -p 2222 -l ada -- far`, `'/opt/nc' -U "${XDG_RUNTIME_DIR:-$HOME/.cache}/libvirt/libvirt-sock"`, "-p 2222 ada@far",
		},
		"qemu+ssh://far/system?keyfile=/k%3Bid": {` -i /k;id -- far`, helper, `-i '/k;id' far`},
		"qemu+ssh://[fe80::1]/system":           {` -- fe80::1`, helper, "fe80::1"},
		"qemu+ssh://far/system?socket=/a'b":     {` -- far`, `nc -U '/a'\''b'`, "far"},
	} {
		a, err := parseURI(uri)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := strings.Join(a.sshArgs(), " "), always+want[0]+" sh -c "+quote(want[1]); got != want {
			t.Errorf("%s:\n got %s\nwant %s", uri, got, want)
		}
		if got, want := a.sshTry(), "ssh -T "+want[2]+" true"; got != want {
			t.Errorf("%s:\n got %s\nwant %s", uri, got, want)
		}
	}
}

// A Labfile may be a stranger's: nothing in a URI is read by a shell or as an option.
func TestHostileURIs(t *testing.T) {
	for _, uri := range []string{
		"qemu+ssh://-oProxyCommand=id/system", "qemu+ssh://$(id)/system", "qemu+ssh://x';id;'/system", "qemu+ssh://-x@far/system",
		"qemu+ssh://a%20b@far/system", "qemu+ssh://far/system?pool=x%3Bcurl", "qemu+ssh://far/system?pool=-x", "qemu+ssh://far/system?keyfile=k",
		"qemu+ssh://far:22;id/system",
	} {
		if a, err := parseURI(uri); err == nil {
			t.Errorf("%s became %+v", uri, a)
		}
	}
}
