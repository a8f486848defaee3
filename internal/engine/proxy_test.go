// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/proxy"
)

// proxied is an environment with a proxy.
func proxied(url string) func(string) string {
	return func(name string) string {
		if name == "http_proxy" {
			return url
		}
		return ""
	}
}

// To inherit the proxy is part of the plan and replaces nothing; which one it is is neither
// planned nor recorded.
func TestInheritProxy(t *testing.T) {
	b := newBench(t)
	l := b.open()
	want := b.want(machine("web"))
	b.up(l, want)

	want.InheritProxy = true
	b.Getenv = proxied("http://ada:s3cret@127.0.0.1:0")
	var bad *proxy.EnvError
	before, err := os.ReadFile(b.Dirs.Ledger(l.id))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Up(b.ctx, want, UpOptions{}); !errors.As(err, &bad) || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("a bad setting: %v", err)
	}
	if after, _ := os.ReadFile(b.Dirs.Ledger(l.id)); !bytes.Equal(before, after) {
		t.Errorf("a bad setting changed the record:\n%s", after[len(before):])
	}

	b.Getenv = proxied("http://ada:s3cret@127.0.0.1:3128")
	p := b.up(l, want)
	if diff := cmp.Diff([]string{"guests get the proxy settings of this host"}, p.Changed); diff != "" || p.Count(plan.Keep) != 1 {
		t.Errorf("%+v\n%s", p, diff)
	}
	b.Getenv = proxied("http://ada:s3cret@other:3128")
	p, err = l.Plan(b.ctx, want, UpOptions{})
	if err != nil || p.Changes() {
		t.Errorf("another proxy is planned: %+v, %v", p, err)
	}

	// What was recorded is what "start" goes by, and bad settings keep no machine from stopping.
	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	b.Getenv = proxied("ssh://ada:s3cret@p")
	if err := l.Start(b.ctx, Options{}); !errors.As(err, &bad) {
		t.Errorf("start with a bad setting: %v", err)
	}
	b.Getenv = nil
	if err := l.Start(b.ctx, Options{}); err != nil {
		t.Error(err)
	}
	b.Getenv = proxied("ssh://ada:s3cret@p")
	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Error(err)
	}
	book, err := os.ReadFile(b.Dirs.Ledger(l.id))
	if err != nil || bytes.Contains(book, []byte("s3cret")) || bytes.Contains(book, []byte(":3128")) {
		t.Errorf("the record tells of the proxy (%v):\n%s", err, book)
	}
	state, err := l.read()
	if err != nil || !state.Opened.InheritProxy || !state.Proxied {
		t.Errorf("%+v, %v", state, err)
	}
}

func TestProxies(t *testing.T) {
	b := newBench(t)
	l := b.Lab("shop-1")
	b.Getenv = proxied("http://localhost:9000")
	gone := ledger.Machine{Phase: ledger.PhaseGone}
	state := ledger.State{
		Opened: ledger.Opened{InheritProxy: true, Expose: []ledger.Exposed{{Name: "api", Port: 9000}}},
		Machines: map[lab.Name]ledger.Machine{
			"web-1": {Phase: ledger.PhaseReady, Create: ledger.Create{Spec: ledger.Spec{Role: "web"}, Direct: netip.MustParsePrefix("10.130.1.10/16")}},
			"old":   gone,
		},
	}
	g, err := l.proxies(state, []lab.Machine{machine("db")})
	if err != nil {
		t.Fatal(err)
	}
	want := []proxy.Relay{{Name: "gateway.lab.internal", Port: 9001, To: []string{"127.0.0.1:9000", "[::1]:9000"}}}
	if diff := cmp.Diff(want, g.Relays); diff != "" {
		t.Error(diff)
	}
	const bypass = "no_proxy=localhost,127.0.0.0/8,127.0.0.1,::1,.lab.internal,gateway.lab.internal,gateway,api,db,web,web-1,"
	if got, want := g.Env[len(g.Env)-1], bypass+lab.NetworkOf(l.id).Subnet.String()+",10.130.0.0/16"; got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	state.Opened.InheritProxy = false
	if g, err := l.proxies(state, nil); err != nil || len(g.Env)+len(g.Relays) > 0 {
		t.Errorf("without the key: %+v, %v", g, err)
	}
}

// cloud-init has the settings before anything that it starts, but not in a bake: what it
// keeps of a seed would be part of the image.
func TestProxyInSeeds(t *testing.T) {
	b := newBench(t)
	l := b.open()
	b.Getenv = proxied("http://ada:s3cret@p:3128")
	s := &session{Lab: l, state: ledger.State{Opened: ledger.Opened{InheritProxy: true}}}
	if err := l.host.Dirs.Claim(l.id); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(b.Dirs.Keys(l.id), 0o700); err != nil {
		t.Fatal(err)
	}
	addr := lab.NetworkOf(l.id).Host(10)
	for name, wanted := range map[lab.Name]bool{"web": true, lab.BakePrefix + "a1b2c3": false} {
		m := machine(name)
		spec, err := s.spec(lab.Generation{Lab: l.id, Machine: name, Number: 1}, m, Image{CloudInit: true}, ledger.Create{Spec: ledger.SpecOf(m), Address: addr})
		if err != nil {
			t.Fatal(err)
		}
		if has := bytes.Contains(spec.Seed, []byte("http_proxy=http://ada:s3cret@gateway.lab.internal:3128")); has != wanted || len(spec.Seed) == 0 {
			t.Errorf("%s: the seed tells of the proxy: %v, want %v", name, has, wanted)
		}
	}
}
