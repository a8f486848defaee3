// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/boxes/source"
	"github.com/labfile/lab/internal/cli"
	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

// desk is where a user sits: a folder with a Labfile, on a host whose machines
// and supervisors live in this process.
type desk struct {
	t      *testing.T
	folder string
	host   *engine.Host
	env    map[string]string
	in     string
	supers sync.WaitGroup

	memory *memory.Provider
	mute   *hush // of the machines of newAnsweringDesk
}

func newDesk(t *testing.T, labfile string) *desk {
	t.Helper()
	return newDeskOn(t, labfile, memory.Config{})
}

// newDeskOn is newDesk with machines as cfg has them.
func newDeskOn(t *testing.T, labfile string, cfg memory.Config) *desk {
	t.Helper()
	root, err := os.MkdirTemp("", "lab-c-") // short: sockets live below it
	if err != nil {
		t.Fatal(err)
	}
	folder, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	d := &desk{t: t, folder: folder, env: map[string]string{}, memory: memory.New(cfg)}
	places := dirs.Dirs{Data: filepath.Join(root, "data"), Run: filepath.Join(root, "run"), Cache: filepath.Join(root, "cache")}
	store, err := boxes.Open(places.Boxes())
	if err != nil {
		t.Fatal(err)
	}
	p := d.memory
	d.host = &engine.Host{
		Dirs: places, Providers: map[string]providers.Provider{
			p.Name(): p, engine.DefaultProvider: memory.New(memory.Config{}), // a lab that is not there has the default
		},
		Boxes: &source.Resolver{Store: store, Cache: places.Downloads()}, Log: slog.New(slog.DiscardHandler),
		Patience: time.Millisecond, // no guest here has an ssh server
	}
	d.host.Spawn = func(id lab.ID) error { return d.spawn(p, id) }
	d.write("Labfile", labfile)
	d.write("disk.raw", strings.Repeat("x", 4096))
	t.Cleanup(func() {
		d.supers.Wait()
		os.RemoveAll(root)
	})
	return d
}

func (d *desk) spawn(p providers.Provider, id lab.ID) error {
	ready, ended := make(chan struct{}), make(chan error, 1)
	d.supers.Add(1)
	go func() {
		defer d.supers.Done()
		book := ledger.Open(d.host.Dirs.Ledger(id))
		ended <- supervise.Run(context.Background(), supervise.Config{
			ID: id, Dirs: d.host.Dirs, Provider: p, Ready: func() { close(ready) },
			Record: func(e supervise.Event) error {
				_, err := book.Append(ledger.Record{
					Type: ledger.MachineExited, Machine: e.Generation.Machine, Generation: e.Generation.Number,
				}, ledger.Exited{Reason: string(e.Exit.Reason), Detail: e.Exit.Detail})
				return err
			},
		})
	}()
	select {
	case <-ready:
		return nil
	case err := <-ended:
		return err
	}
}

func (d *desk) write(name, text string) {
	d.t.Helper()
	if err := os.WriteFile(filepath.Join(d.folder, name), []byte(text), 0o600); err != nil {
		d.t.Fatal(err)
	}
}

// run types a command line and returns what is seen.
func (d *desk) run(args ...string) (code int, out, errOut string) {
	d.t.Helper()
	return d.runContext(d.t.Context(), args...)
}

func (d *desk) runContext(ctx context.Context, args ...string) (code int, out, errOut string) {
	d.t.Helper()
	var o, e bytes.Buffer
	code = cli.Run(ctx, cli.Config{
		In: strings.NewReader(d.in), Out: &o, Err: &e,
		Getenv: func(k string) string { return d.env[k] },
		Dir:    func() (string, error) { return d.folder, nil },
		Host:   func(*slog.Logger) (*engine.Host, error) { return d.host, nil },
	}, args)
	return code, o.String(), e.String()
}

// ok is run for what must succeed; it returns the answer.
func (d *desk) ok(args ...string) string {
	d.t.Helper()
	code, out, errOut := d.run(args...)
	if code != 0 {
		d.t.Fatalf("lab %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, errOut)
	}
	return out
}

const shop = `lab: shop
provider: memory
boxes: {base: ./disk.raw}
machines:
  db:
    box: base
    ready: [{console: lab test disk, timeout: 1m, interval: 10ms}]
  web:
    box: base
    depends_on: [db]
    ready: [{console: lab test disk, timeout: 1m, interval: 10ms}]
`

var varying = regexp.MustCompile(`shop-[0-9a-f]{8}|two-[0-9a-f]{8}|10\.\d+\.\d+\.(\d+)|sha256:[0-9a-f]{64}|\(?\b\d+(\.\d+)?(ms|s)\)?`)

// steady replaces what differs from run to run.
func steady(s string) string {
	return varying.ReplaceAllStringFunc(s, func(m string) string {
		switch {
		case strings.HasPrefix(m, "10."):
			return "IP"
		case strings.Contains(m, "-"):
			return "LAB"
		case strings.HasPrefix(m, "sha256:"):
			return "DIGEST"
		}
		return "TIME"
	})
}

func TestALabsLife(t *testing.T) {
	d := newDesk(t, shop)
	defer func() { _, _, _ = d.run("destroy", "--yes") }()

	code, out, errOut := d.run("up")
	if code != 0 {
		t.Fatalf("up: exit code %d: %s", code, errOut)
	}
	wantErr := `db: creating from base
db: booting
db: waiting for console /lab test disk/
db: freezing its disk
db: ready: IP TIME
web: creating from base
web: booting
web: waiting for console /lab test disk/
web: freezing its disk
web: ready: IP TIME
`
	if !strings.HasSuffix(steady(errOut), wantErr) {
		t.Error(cmp.Diff(wantErr, steady(errOut)))
	}
	for _, want := range []string{"lab shop-", "NAME  GEN  STATE  ADDRESS", "db    1    ready  10.", "web   1    ready  10."} {
		if !strings.Contains(out, want) {
			t.Errorf("up did not answer %q:\n%s", want, out)
		}
	}

	var status engine.Status
	if err := json.Unmarshal([]byte(d.ok("status", "--json")), &status); err != nil {
		t.Fatal(err)
	}
	if len(status.Machines) != 2 || status.Machines[1].State != engine.StateReady || status.Provider != "memory" {
		t.Errorf("status --json says %+v", status)
	}
	if got := d.ok("plan"); !strings.HasSuffix(got, "\nNothing to do: 2 machines as wanted.\n") {
		t.Errorf("plan says\n%s", got)
	}
	if got := d.ok("up", "-q"); got != "" {
		t.Errorf("up -q says %q", got)
	}
	if got := d.ok("logs", "web"); got != "lab test disk\r\n" {
		t.Errorf("logs says %q", got)
	}
	if got := d.ok("logs", "web", "-n", "0"); got != "" {
		t.Errorf("logs -n 0 says %q", got)
	}

	// A reader is told who the machines are, and a typo what was meant.
	code, _, errOut = d.run("ssh", "wbe")
	if want := "lab: error: there is no machine \"wbe\"\nlab: hint: did you mean \"web\"?\n"; code != 3 || errOut != want {
		t.Errorf("ssh wbe: %d, %q, want 3, %q", code, errOut, want)
	}

	// A change in the Labfile is shown before it costs a disk.
	d.write("Labfile", strings.Replace(shop, "  db:\n", "  db:\n    cpus: 2\n", 1))
	if code, out, _ := d.run("plan"); code != 2 || !strings.Contains(out, "-/+  db   replace  generation 1 -> 2\n") {
		t.Errorf("plan: %d\n%s", code, out)
	}
	if code, _, errOut := d.run("up"); code != 0 || !strings.Contains(errOut, "-/+  db   replace") {
		t.Errorf("up: %d\n%s", code, errOut)
	}

	d.ok("rebuild", "web")
	if code, _, errOut := d.run("rebuild", "web", "--all"); code != 3 {
		t.Errorf("rebuild web --all: %d, %s", code, errOut)
	}
	d.ok("stop", "web", "--grace", "1s")
	if got := d.ok("status"); !strings.Contains(got, "web   2    stopped") {
		t.Errorf("status says\n%s", got)
	}
	code, _, errOut = d.run("ssh", "web", "true")
	if code != 1 || !strings.Contains(errOut, `lab: hint: "lab up" starts it; "lab status" says how it ended`) {
		t.Errorf("ssh to a stopped machine: %d, %s", code, errOut)
	}
	d.ok("start", "web")
	for _, want := range []string{"web@1: ready", "web@2: ready", "\nlab rebuild web\n  20"} {
		if got := d.ok("history", "web"); !strings.Contains(got, want) {
			t.Errorf("history does not say %q:\n%s", want, got)
		}
	}
	if got := d.ok("list"); !strings.Contains(got, "shop-") || !strings.Contains(got, filepath.Join(d.folder, "Labfile")) {
		t.Errorf("list says\n%s", got)
	}

	// Destroying wants a yes, and leaves nothing.
	if code, _, errOut := d.run("destroy"); code != 3 || !strings.HasSuffix(errOut, "lab: hint: add --yes\n") {
		t.Errorf("destroy: %d, %s", code, errOut)
	}
	d.ok("destroy", "web", "--yes")

	// What the Labfile has and the lab has not is not passed over.
	code, out, errOut = d.run("status")
	if want := "lab: not up: web (\"lab up\" creates what is missing)\n"; code != 0 || errOut != want || strings.Contains(out, "web") {
		t.Errorf("status of a part: %d, %q, want 0, %q\n%s", code, errOut, want, out)
	}
	if got := d.ok("status", "--json"); !strings.Contains(got, "  \"absent\": [\n    \"web\"\n  ]\n") {
		t.Errorf("status --json of a part says\n%s", got)
	}
	d.ok("destroy", "--yes")
	if got := d.ok("list"); got != "no labs\n" {
		t.Errorf("list says\n%s", got)
	}
	code, _, errOut = d.run("status")
	want := "lab: error: there is no such lab\nlab: hint: \"lab up\" brings it up; \"lab list\" shows the labs there are\n"
	if code != 1 || errOut != want {
		t.Errorf("status of nothing: %d, %q, want 1, %q", code, errOut, want)
	}
}

func TestTwoInstances(t *testing.T) {
	d := newDesk(t, shop)
	defer func() {
		_, _, _ = d.run("destroy", "--yes")
		_, _, _ = d.run("destroy", "--yes", "--name", "two")
	}()
	d.ok("up", "-q")
	d.env["LAB_NAME"] = "two"
	d.ok("up", "-q")
	if got := d.ok("status"); !strings.HasPrefix(got, "lab two-") {
		t.Errorf("status says\n%s", got)
	}
	var labs struct{ Labs []engine.Summary }
	if err := json.Unmarshal([]byte(d.ok("list", "--json")), &labs); err != nil {
		t.Fatal(err)
	}
	if len(labs.Labs) != 2 || labs.Labs[0].Name != "shop" || labs.Labs[1].Name != "two" {
		t.Errorf("list --json says %+v", labs.Labs)
	}

	// By its ID, or the beginning of it, a lab is found from anywhere.
	delete(d.env, "LAB_NAME")
	d.folder = t.TempDir()
	if got := d.ok("status", "--lab", "two"); !strings.HasPrefix(got, "lab two-") {
		t.Errorf("status --lab says\n%s", got)
	}
	if got := d.ok("plan", "--lab", string(labs.Labs[1].ID)); !strings.Contains(got, "Nothing to do") {
		t.Errorf("plan --lab says\n%s", got)
	}
	for _, s := range labs.Labs {
		d.ok("destroy", "--lab", string(s.ID), "--yes")
	}
}

func TestALabOutlivesItsLabfile(t *testing.T) {
	for name, spoil := range map[string]func(*desk){
		"removed": func(d *desk) { os.Remove(filepath.Join(d.folder, "Labfile")) },
		"broken":  func(d *desk) { d.write("Labfile", "lab: shop\nmachines: 7\n") },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, shop)
			d.ok("up", "-q")
			spoil(d)
			code, out, errOut := d.run("status")
			if code != 0 || !strings.Contains(out, "web   1    ready") {
				t.Errorf("status: %d, %s%s", code, out, errOut)
			}
			if want := "lab: the Labfile is missing or cannot be read: this is about lab LAB, which was made from it\n"; steady(errOut) != want {
				t.Errorf("status noted %q, want %q", steady(errOut), want)
			}
			if code, _, errOut := d.run("status", "-f", "Labfile"); code != 0 {
				t.Errorf("status -f: %d, %s", code, errOut)
			}
			if code, _, _ := d.run("up"); code != 3 {
				t.Errorf("up without a Labfile: exit code %d, want 3", code)
			}
			d.ok("destroy", "--yes")
			if got := d.ok("list"); got != "no labs\n" {
				t.Errorf("list says\n%s", got)
			}
		})
	}
}

// "all", which no machine can be called, stands for every machine.
func TestAllMachines(t *testing.T) {
	d := newDesk(t, shop)
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	d.ok("up", "all", "-q")
	d.ok("stop", "all", "--grace", "1s")
	code, _, errOut := d.run("exec", "all", "--", "true")
	if want := "lab: error: no machine of the lab runs\nlab: hint: \"lab up\" starts them\n"; code != 1 || errOut != want {
		t.Errorf("exec all: %d, %q, want 1, %q", code, errOut, want)
	}
	d.ok("start", "all")
	if got := d.ok("rebuild", "all"); !strings.Contains(got, "db    2    ready") || !strings.Contains(got, "web   2    ready") {
		t.Errorf("rebuild all says\n%s", got)
	}
	code, _, errOut = d.run("destroy", "all", "web", "--yes")
	if want := "lab: error: \"all\" means every machine and stands alone\nlab: hint: leave out the other names\n"; code != 3 || errOut != want {
		t.Errorf("destroy all web: %d, %q, want 3, %q", code, errOut, want)
	}
	d.ok("destroy", "all", "--yes")
	if got := d.ok("list"); got != "no labs\n" {
		t.Errorf("list says\n%s", got)
	}
}

func TestFailuresAreExplained(t *testing.T) {
	d := newDesk(t, strings.Replace(shop, "console: lab test disk, timeout: 1m", "console: never, timeout: 1s", 1))
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	code, out, errOut := d.run("up")
	if code != 1 || out != "" {
		t.Errorf("up: %d, %q, want 1 and no answer", code, out)
	}
	for _, want := range []string{
		"lab: error: 1 machine failed\n  db: ",
		"\n  not tried, because of what failed: web\n",
		"lab: hint: \"lab logs db\" shows what the machine printed, \"lab console db\" opens its console; the next \"lab up\" goes on from here\n",
	} {
		if !strings.Contains(errOut, want) {
			t.Errorf("up does not say %q:\n%s", want, errOut)
		}
	}
	if got := d.ok("status"); !strings.Contains(got, "db    1    failed") {
		t.Errorf("status says\n%s", got)
	}
}

func TestInterruption(t *testing.T) {
	d := newDesk(t, strings.Replace(shop, "console: lab test disk, timeout: 1m", "console: never, timeout: 10m", 1))
	ctx, cancel := context.WithCancel(t.Context())
	// The machine's console log begins when it boots.
	go func() {
		for ctx.Err() == nil {
			if code, out, _ := d.run("logs", "db", "-q"); code == 0 && out != "" {
				cancel()
			}
		}
	}()
	code, out, errOut := d.runContext(ctx, "up")
	cancel()
	if code != 130 || out != "" || !strings.HasSuffix(errOut, "lab: error: interrupted\n") {
		t.Errorf("up: %d, %q, %q", code, out, errOut)
	}
	if got := d.ok("list"); got != "no labs\n" {
		t.Errorf("list says\n%s", got)
	}
}

func TestSSHConfigNamesEveryMachine(t *testing.T) {
	d := newDesk(t, shop)
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	d.ok("up", "-q")
	var conf struct{ Hosts []map[string]any }
	if err := json.Unmarshal([]byte(d.ok("ssh-config", "--json")), &conf); err != nil {
		t.Fatal(err)
	}
	if len(conf.Hosts) != 2 || conf.Hosts[1]["name"] != "web" || conf.Hosts[1]["user"] == "" {
		t.Errorf("ssh-config --json says %v", conf.Hosts)
	}
	if got := d.ok("ssh-config", "web"); strings.Contains(got, "Host db") || !strings.Contains(got, "\nHost web.shop web.shop-") {
		t.Errorf("ssh-config web says\n%s", got)
	}
	if code, _, errOut := d.run("ssh-config", "wbe"); code != 3 || !strings.Contains(errOut, `did you mean "web"?`) {
		t.Errorf("ssh-config wbe: %d, %s", code, errOut)
	}
}

// What is about a lab that is there does not make one.
func TestNothingToReplaceOrBurn(t *testing.T) {
	d := newDesk(t, shop)
	want := "lab: error: there is no such lab\nlab: hint: \"lab up\" brings it up; \"lab list\" shows the labs there are\n"
	for _, args := range [][]string{{"replace", "web"}, {"replace", "--all"}, {"burn"}, {"burn", "web", "--yes"}} {
		if code, out, errOut := d.run(args...); code != 1 || out != "" || errOut != want {
			t.Errorf("lab %v: %d, %q, want 1, %q\n%s", args, code, errOut, want, out)
		}
	}
	if got := d.ok("list"); got != "no labs\n" {
		t.Errorf("list says\n%s", got)
	}
	d.ok("up", "-q", "db")
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	code, _, errOut := d.run("burn", "wbe")
	if want := "lab: error: there is no machine \"wbe\"\n"; code != 3 || !strings.HasPrefix(errOut, want) {
		t.Errorf("burn wbe: %d, %q, want 3, %q", code, errOut, want)
	}
	code, _, errOut = d.run("burn")
	if want := "there is no terminal to ask on whether to destroy db of lab shop-"; code != 3 || !strings.Contains(errOut, want) {
		t.Errorf("burn: %d, %q, want 3, %q", code, errOut, want)
	}
	for _, other := range []string{"--name", "--file"} {
		code, _, errOut := d.run("status", "--lab", "shop", other, "two")
		want := "lab: error: --lab says which lab is meant, and so does " + other + "\nlab: hint: leave one of them out\n"
		if code != 3 || errOut != want {
			t.Errorf("status --lab %s: %d, %q, want 3, %q", other, code, errOut, want)
		}
	}
}
