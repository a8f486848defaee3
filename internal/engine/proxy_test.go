// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"context"
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
	"github.com/labfile/lab/internal/supervise"
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
	g, err := l.proxies(state, []lab.Machine{machine("db")}, nil)
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
	if g, err := l.proxies(state, nil, nil); err != nil || len(g.Env)+len(g.Relays) > 0 {
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
	if err := s.record(ledger.LabOpened, lab.Generation{}, ledger.Opened{Name: "shop", Provider: "memory", InheritProxy: true}); err != nil {
		t.Fatal(err)
	}
	addr := lab.NetworkOf(l.id).Host(10)
	for name, wanted := range map[lab.Name]bool{"web": true, lab.BakePrefix + "a1b2c3": false} {
		m := machine(name)
		if err := s.record(ledger.MachineCreate, lab.Generation{Lab: l.id, Machine: name, Number: 1}, ledger.Create{Spec: ledger.SpecOf(m), Address: addr}); err != nil {
			t.Fatal(err)
		}
		spec, err := s.spec(lab.Generation{Lab: l.id, Machine: name, Number: 1}, m, Image{CloudInit: true}, ledger.Create{Spec: ledger.SpecOf(m), Address: addr})
		if err != nil {
			t.Fatal(err)
		}
		if has := bytes.Contains(spec.Seed, []byte("http_proxy=http://ada:s3cret@gateway.lab.internal:3128")); has != wanted || len(spec.Seed) == 0 {
			t.Errorf("%s: the seed tells of the proxy: %v, want %v", name, has, wanted)
		}
		if got := s.machine(name).Proxied; got != wanted {
			t.Errorf("%s: that it has the proxy is recorded: %v, want %v", name, got, wanted)
		}
	}
}

// relays returns the ports of the relays that guests were told of, and where they lead.
func (b *bench) relays(l *Lab) map[uint16]string {
	b.t.Helper()
	all, err := supervise.Relays(b.Dirs, l.id)
	if err != nil {
		b.t.Fatal(err)
	}
	m := map[uint16]string{}
	for _, r := range all {
		m[r.Port] = strings.Join(r.To, " ")
	}
	return m
}

// environment is one with these variables, NAME=VALUE.
func environment(vars ...string) func(string) string {
	return func(name string) string {
		for _, v := range vars {
			if value, ok := strings.CutPrefix(v, name+"="); ok {
				return value
			}
		}
		return ""
	}
}

// Only a command that tells every guest takes proxies away, or has a port lead to another one.
func TestRelaysOfOthersStay(t *testing.T) {
	b := newBench(t)
	l := b.open()
	want := b.want(machine("db"), provisioned("web", "one"))
	b.stock(l, want, "web", 1)
	b.up(l, want)
	want.InheritProxy = true
	both := map[uint16]string{3128: "a:3128", 3129: "b:3128"}
	b.Getenv = environment("http_proxy=http://a:3128", "https_proxy=http://b:3128")
	b.up(l, want)
	same := func(when string, want map[uint16]string) {
		t.Helper()
		if diff := cmp.Diff(want, b.relays(l)); diff != "" {
			t.Errorf("%s:\n%s", when, diff)
		}
	}
	same("up", both)
	partly := func(vars ...string) {
		t.Helper()
		b.Getenv = environment(vars...)
		if _, err := l.Up(b.ctx, want, UpOptions{Options: Options{Machines: []lab.Name{"web"}}}); err != nil {
			t.Fatal(err)
		}
	}
	partly()
	same("up web without a proxy", both)
	partly("http_proxy=http://b:3128")
	same("up web with one of them", both)
	partly("http_proxy=http://c:3128")
	three := map[uint16]string{3128: "a:3128", 3129: "b:3128", 3130: "c:3128"}
	same("up web with another one", three)

	b.Getenv = environment()
	if err := l.Stop(b.ctx, StopOptions{Options: Options{Machines: []lab.Name{"web"}}}); err != nil {
		t.Fatal(err)
	}
	if err := l.Start(b.ctx, Options{Machines: []lab.Name{"web"}}); err != nil {
		t.Fatal(err)
	}
	same("start web", three)

	// A bake fails here, since no guest has a shell, after it has told the supervisor.
	without := b.want(machine("db"), provisioned("web", "two"))
	bake := func(w *lab.Lab) {
		t.Helper()
		ctx, cancel := context.WithCancel(b.ctx)
		defer cancel()
		_, err := l.Bake(ctx, w, BakeOptions{UpOptions: UpOptions{Options: Options{Events: func(e Event) {
			if strings.HasPrefix(e.Text, "booting a throw-away machine") {
				cancel()
			}
		}}}})
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	bake(without)
	same("bake", three)
	state, err := l.read()
	if err != nil || !state.Opened.InheritProxy {
		t.Errorf("a bake recorded what no guest was told: %+v, %v", state.Opened, err)
	}

	b.Getenv = environment("http_proxy=http://b:3128")
	b.up(l, want)
	same("up of all", map[uint16]string{3128: "b:3128"})
	want.InheritProxy = false
	b.up(l, want)
	same("up without the key", map[uint16]string{})
}

// A guest that cannot be told is one that keeps what it has, if it has anything; what it
// has leads on. One that has nothing, and is to have nothing, is not bothered.
func TestUntoldGuests(t *testing.T) {
	b := newBench(t)
	l := b.open()
	want := b.want(machine("web"))
	want.InheritProxy = true
	notes := func(vars ...string) string {
		t.Helper()
		var texts []string
		b.Getenv = environment(vars...)
		if _, err := l.Up(b.ctx, want, UpOptions{Options: Options{Events: func(e Event) {
			if e.Stage == StageNote && strings.Contains(e.Text, "proxy settings") {
				texts = append(texts, e.Text)
			}
		}}}); err != nil {
			t.Fatal(err)
		}
		return strings.Join(texts, "\n")
	}
	const lost, kept = "its services and its own logins do not get the proxy settings: ", "its services and its own logins keep the proxy settings that they have: "
	if got := notes(); got != "" {
		t.Errorf("without a proxy: %s", got)
	}
	if got := notes("http_proxy=http://a:3128"); !strings.HasPrefix(got, lost) || !strings.HasSuffix(got, "; \"lab up\" tries again") {
		t.Errorf("with a proxy: %s", got)
	}
	if got := notes(); got != "" {
		t.Errorf("without a proxy, after one that it was not told of: %s", got)
	}
	if got := b.relays(l); len(got) > 0 {
		t.Errorf("relays that no guest knows: %v", got)
	}
	g := lab.Generation{Lab: l.id, Machine: "web", Number: 1}
	if _, err := l.book.Append(ledger.Record{Type: ledger.MachineProxied, Machine: g.Machine, Generation: g.Number}, ledger.Proxied{Written: true}); err != nil {
		t.Fatal(err)
	}
	if got := notes("http_proxy=http://a:3128"); !strings.HasPrefix(got, kept) {
		t.Errorf("with a proxy, after another one: %s", got)
	}
	if got := notes(); !strings.HasPrefix(got, kept) {
		t.Errorf("taking back: %s", got)
	}
	if got := b.relays(l); got[3128] != "a:3128" {
		t.Errorf("the way to a proxy that the guest keeps is closed: %v", got)
	}
}
