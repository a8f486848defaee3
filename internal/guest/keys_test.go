// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/labfile/lab/internal/guest"
)

func TestKey(t *testing.T) {
	k := newKey(t)
	again, err := guest.ParseKey(k.PEM)
	if err != nil {
		t.Fatal(err)
	}
	pub := k.Signer.PublicKey()
	if guest.AuthorizedKey(again.Signer.PublicKey()) != guest.AuthorizedKey(pub) {
		t.Error("a key is not what it was after reading it")
	}
	if got := guest.AuthorizedKey(pub); !strings.HasPrefix(got, "ssh-ed25519 AAAA") || strings.HasSuffix(got, "\n") {
		t.Errorf("authorized key %q", got)
	}
	if got, want := guest.KnownHostsLine("web.shop-1.lab.internal", pub), "web.shop-1.lab.internal "+guest.AuthorizedKey(pub)+"\n"; got != want {
		t.Errorf("known hosts %q, want %q", got, want)
	}
	if _, err := guest.ParseKey([]byte("x")); err == nil || err.Error() != "reading a key: ssh: no key found" {
		t.Errorf("nonsense: %v", err)
	}
}

func TestQuote(t *testing.T) {
	for _, tc := range []struct {
		words []string
		want  string
	}{
		{nil, ""},
		{[]string{"ls", "-l", "/srv/a.b"}, "ls -l /srv/a.b"},
		{[]string{"", "a b", "it's", "$x", "~", "*", "a=b", "\n"}, `'' 'a b' 'it'\''s' '$x' '~' '*' 'a=b' '` + "\n'"},
	} {
		if got := guest.Quote(tc.words); got != tc.want {
			t.Errorf("Quote(%q) = %s, want %s", tc.words, got, tc.want)
		}
	}
}

func FuzzQuote(f *testing.F) {
	f.Add("a b", "it's")
	f.Add("$(id)`id`\\", "\"'\n\t")
	f.Add("-n", "!x~{a,b}")
	f.Fuzz(func(t *testing.T, a, b string) {
		if strings.ContainsRune(a+b, 0) {
			return // no argument can hold it
		}
		out, err := exec.Command("/bin/sh", "-c", `printf '%s\0' `+guest.Quote([]string{a, b})).Output()
		if want := a + "\x00" + b + "\x00"; err != nil || string(out) != want {
			t.Errorf("got %q, %v; want %q", out, err, want)
		}
	})
}
