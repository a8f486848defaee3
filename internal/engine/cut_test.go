// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

// change is one command that changes a lab, and the Labfile that it begins with.
type change struct {
	name  string
	setup func(*bench) *lab.Lab
	more  func(*bench, *Lab, *lab.Lab) error // runs before do, after up
	do    func(*bench, *Lab, *lab.Lab) error
	fails bool       // do returns an error
	named []lab.Name // machines that the user wants to be gone
}

func one(s lab.Strategy, set func(*lab.Machine)) func(*bench) *lab.Lab {
	return func(b *bench) *lab.Lab {
		m := replaced("web", s)
		m.Replace.Drain = time.Millisecond
		if set != nil {
			set(&m)
		}
		return b.want(m)
	}
}

// with is the lab with every machine changed.
func with(b *bench, w *lab.Lab, set func(*lab.Machine)) *lab.Lab {
	ms := slices.Clone(w.Machines)
	for i := range ms {
		set(&ms[i])
	}
	return b.want(ms...)
}

func hopeless(m *lab.Machine) {
	*m = broken(*m)
	m.Ready[0].Timeout = 20 * time.Millisecond
}

func discard(m *lab.Machine)  { m.Replace.OnFailure = lab.DiscardFailed }
func keepNone(m *lab.Machine) { m.Replace.Keep = 0 }

func rebuild(b *bench, l *Lab, w *lab.Lab) error {
	_, err := l.Rebuild(b.ctx, w, UpOptions{})
	return err
}

func replaceByHopeless(b *bench, l *Lab, w *lab.Lab) error {
	_, err := l.Up(b.ctx, with(b, w, hopeless), UpOptions{})
	return err
}

func replaceByUnbootable(b *bench, l *Lab, w *lab.Lab) error {
	_, err := l.Up(b.ctx, with(b, w, func(m *lab.Machine) {
		m.Boot = []lab.BootStep{bootOf(lab.Provision{Shell: "exit 3"})}
	}), UpOptions{})
	return err
}

// interruptedAt replaces all machines, with a Ctrl-C at a stage.
func interruptedAt(stage Stage) func(*bench, *Lab, *lab.Lab) error {
	return func(b *bench, l *Lab, w *lab.Lab) error {
		ctx, cancel := context.WithCancel(b.ctx)
		defer cancel()
		_, err := l.Rebuild(ctx, w, UpOptions{Options: Options{Events: func(e Event) {
			if e.Stage == stage {
				cancel()
			}
		}}})
		return err
	}
}

// kindsOfChange are all kinds of commands that change a lab.
func kindsOfChange() []change {
	var all []change
	for _, s := range []lab.Strategy{lab.StopFirst, lab.BlueGreen, lab.Rolling} {
		all = append(
			all,
			change{name: "replace, " + string(s), setup: one(s, nil), do: rebuild},
			change{name: "replace and keep none, " + string(s), setup: one(s, keepNone), do: rebuild},
			change{name: "failed replacement, " + string(s), setup: one(s, nil), do: replaceByHopeless, fails: true},
			change{name: "failed and discarded replacement, " + string(s), setup: one(s, discard), do: replaceByHopeless, fails: true},
			change{
				name:  "failed and discarded replacement, none kept, " + string(s),
				setup: one(s, func(m *lab.Machine) { discard(m); keepNone(m) }), do: replaceByHopeless, fails: true,
			},
			change{name: "interrupted while it is made, " + string(s), setup: one(s, nil), do: interruptedAt(StageCreate), fails: true},
			change{name: "interrupted while it boots, " + string(s), setup: one(s, nil), do: interruptedAt(StageBoot), fails: true},
			change{name: "second replacement, " + string(s), setup: one(s, nil), more: rebuild, do: rebuild},
			change{
				name: "failed and discarded after another, " + string(s), setup: one(s, discard), more: rebuild,
				do: replaceByHopeless, fails: true,
			},
			change{
				name: "replacement after one that failed, " + string(s), setup: one(s, nil),
				more: func(b *bench, l *Lab, w *lab.Lab) error { _ = replaceByHopeless(b, l, w); return nil }, do: rebuild,
			},
			change{
				name: "rollback, " + string(s), setup: one(s, nil), more: rebuild,
				do: func(b *bench, l *Lab, _ *lab.Lab) error {
					_, err := l.Rollback(b.ctx, "web", 0, Options{})
					return err
				},
			},
			change{
				name: "tainted and replaced, " + string(s), setup: one(s, nil),
				more: func(b *bench, l *Lab, _ *lab.Lab) error {
					return l.Taint(b.ctx, []lab.Name{"web"}, "by hand", Options{})
				},
				do: func(b *bench, l *Lab, w *lab.Lab) error { _, err := l.Up(b.ctx, w, UpOptions{}); return err },
			},
		)
	}
	for _, s := range []lab.Strategy{lab.StopFirst, lab.BlueGreen} {
		boots := func(set func(*lab.Machine)) func(*bench) *lab.Lab {
			return func(b *bench) *lab.Lab {
				b.withAgents()
				m := booted("web", s, "echo one\n")
				m.Replace.Drain = time.Millisecond
				if set != nil {
					set(&m)
				}
				return b.want(m)
			}
		}
		all = append(
			all,
			change{name: "replace with boot steps, " + string(s), setup: boots(nil), do: rebuild},
			change{name: "boot step fails, " + string(s), setup: boots(nil), do: replaceByUnbootable, fails: true},
			change{name: "boot step fails, and it is discarded, " + string(s), setup: boots(discard), do: replaceByUnbootable, fails: true},
			change{name: "interrupted in a boot step, " + string(s), setup: boots(nil), do: interruptedAt(StageBootStep), fails: true},
			change{name: "not ready behind boot steps, " + string(s), setup: boots(discard), do: replaceByHopeless, fails: true},
		)
	}
	web := []lab.Name{"web"}
	replicas := func(set func(*lab.Machine)) func(*bench) *lab.Lab {
		return func(b *bench) *lab.Lab {
			var ms []lab.Machine
			for _, name := range []lab.Name{"web-1", "web-2"} {
				m := replaced(name, lab.Rolling)
				m.Role, m.Replace.Drain = "web", time.Millisecond
				if set != nil {
					set(&m)
				}
				ms = append(ms, m)
			}
			return b.want(ms...)
		}
	}
	writes := func(m *lab.Machine) { m.Volumes = []lab.Volume{bare("data", lab.MiB)} }
	return append(
		all,
		change{name: "interrupted while it takes over", setup: one(lab.BlueGreen, nil), do: interruptedAt(StageHandover), fails: true},
		change{name: "two replicas", setup: replicas(nil), do: rebuild},
		change{name: "two replicas that fail and are discarded", setup: replicas(discard), do: replaceByHopeless, fails: true},
		change{name: "writes to a volume", setup: one(lab.BlueGreen, writes), do: rebuild},
		change{
			name: "writes to a volume and fails", setup: one(lab.BlueGreen, func(m *lab.Machine) { writes(m); discard(m) }),
			do: replaceByHopeless, fails: true,
		},
		change{name: "its port is taken", setup: one(lab.BlueGreen, nil), do: replaceWithTakenPort, fails: true},
		change{name: "its port is taken, and it is discarded", setup: one(lab.BlueGreen, discard), do: replaceWithTakenPort, fails: true},
		change{name: "this host cannot run it", setup: one(lab.StopFirst, nil), do: replaceByIncapable, fails: true},
		change{name: "undone by the next command", setup: one(lab.StopFirst, nil), more: killedWhileItBoots, do: rebuild},
		change{
			name: "undone and discarded by the next command", setup: one(lab.StopFirst, discard), more: killedWhenItHadFailed,
			do: func(b *bench, l *Lab, w *lab.Lab) error { _, err := l.Up(b.ctx, w, UpOptions{}); return err },
		},
		change{
			name: "stop", setup: one(lab.StopFirst, nil),
			do: func(b *bench, l *Lab, _ *lab.Lab) error { return l.Stop(b.ctx, StopOptions{}) },
		},
		change{
			name: "start", setup: one(lab.StopFirst, nil),
			more: func(b *bench, l *Lab, _ *lab.Lab) error { return l.Stop(b.ctx, StopOptions{}) },
			do:   func(b *bench, l *Lab, _ *lab.Lab) error { return l.Start(b.ctx, Options{}) },
		},
		change{
			name: "burn", setup: one(lab.StopFirst, nil), named: web,
			do: func(b *bench, l *Lab, w *lab.Lab) error {
				_, err := l.Burn(b.ctx, w, BurnOptions{})
				return err
			},
		},
		change{
			name:  "destroy one of two",
			setup: func(b *bench) *lab.Lab { return b.want(machine("web"), machine("db")) }, named: web,
			do: func(b *bench, l *Lab, _ *lab.Lab) error { return l.Destroy(b.ctx, Options{Machines: web}) },
		},
		change{
			name:  "taken out of the Labfile",
			setup: func(b *bench) *lab.Lab { return b.want(machine("web"), machine("db")) }, named: web,
			do: func(b *bench, l *Lab, _ *lab.Lab) error {
				_, err := l.Up(b.ctx, b.want(machine("db")), UpOptions{})
				return err
			},
		},
		change{
			name:  "another one is added, and fails",
			setup: func(b *bench) *lab.Lab { return b.want(machine("web")) },
			do: func(b *bench, l *Lab, _ *lab.Lab) error {
				db := machine("db")
				hopeless(&db)
				_, err := l.Up(b.ctx, b.want(machine("web"), db), UpOptions{})
				return err
			},
			fails: true,
		},
	)
}

// replaceWithTakenPort replaces a machine by one that forwards a port which is taken.
func replaceWithTakenPort(b *bench, l *Lab, w *lab.Lab) error {
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	address := other.Addr()
	port := uint16(address.(*net.TCPAddr).Port)
	other.Close()
	// It is taken when the plan has been made, which would have refused it.
	take := func(plan.Plan) error {
		other, err = net.Listen("tcp", address.String())
		return err
	}
	_, rerr := l.Rebuild(b.ctx, with(b, w, func(m *lab.Machine) {
		m.Ports = []lab.Forward{{HostPort: port, GuestPort: 80}}
	}), UpOptions{Options: Options{Confirm: take}})
	if err == nil {
		other.Close()
	}
	return rerr
}

// unable is a provider that cannot start any generation but the first.
type unable struct{ *memory.Provider }

func (u unable) Start(ctx context.Context, g lab.Generation) error {
	if g.Number > 1 {
		return fmt.Errorf("%w: no such processor", providers.ErrIncapable)
	}
	return u.Provider.Start(ctx, g)
}

func replaceByIncapable(b *bench, l *Lab, w *lab.Lab) error {
	able := b.Providers["memory"]
	defer func() { b.Providers["memory"] = able }()
	b.Providers["memory"] = unable{b.provider}
	return rebuild(b, l, w)
}

// killedWhileItBoots leaves what a command leaves that was killed while the next
// generation boots.
func killedWhileItBoots(b *bench, l *Lab, _ *lab.Lab) error {
	state, err := l.read()
	if err != nil {
		return err
	}
	create := state.Machines["web"].Create
	next := lab.Generation{Lab: l.ID(), Machine: "web", Number: 2}
	note := func(t ledger.Type, number int, data any) {
		if err == nil {
			_, err = l.book.Append(ledger.Record{Type: t, Machine: "web", Generation: number}, data)
		}
	}
	note(ledger.MachineStop, 1, nil)
	err = errors.Join(err, b.provider.Stop(b.ctx, lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}, 0))
	note(ledger.MachineStopped, 1, nil)
	note(ledger.MachineCreate, 2, create)
	return errors.Join(
		err, b.provider.Create(b.ctx, providers.Spec{
			Generation: next, CPUs: 1, Memory: lab.MiB, MAC: lab.MACOf(create.Address), Image: providers.Image{Arch: "amd64"},
		}), b.provider.Start(b.ctx, next))
}

func killedWhenItHadFailed(b *bench, l *Lab, w *lab.Lab) error {
	if err := killedWhileItBoots(b, l, w); err != nil {
		return err
	}
	_, err := l.book.Append(ledger.Record{Type: ledger.MachineFailed, Machine: "web", Generation: 2}, ledger.Failed{Error: "no answer"})
	return err
}

// holders returns of every machine the generation that must not be lost: the last one
// that was ready and had the machine's name. It also says which records remove such a
// one. It knows nothing of how the ledger is folded.
func holders(records []ledger.Record, named []lab.Name) (now map[lab.Name]int, lost []string) {
	now = map[lab.Name]int{}
	standby, unbooted := map[string]bool{}, map[string]bool{}
	for _, r := range records {
		key := fmt.Sprintf("%s@%d", r.Machine, r.Generation)
		switch r.Type {
		case ledger.MachineCreate:
			standby[key] = strings.Contains(string(r.Data), `"standby":true`)
			unbooted[key] = strings.Contains(string(r.Data), `"boot":[`)
		case ledger.MachineBooted:
			unbooted[key] = false
		case ledger.MachineReady:
			if unbooted[key] {
				lost = append(lost, fmt.Sprintf("record %d calls %s ready, whose boot steps have not run", r.Seq, key))
			}
			if !standby[key] {
				now[r.Machine] = r.Generation
			}
		case ledger.MachinePromoted:
			standby[key] = false
			now[r.Machine] = r.Generation
		case ledger.MachineDestroy:
			if now[r.Machine] != r.Generation {
				continue
			}
			if !slices.Contains(named, r.Machine) {
				lost = append(lost, fmt.Sprintf("record %d destroys %s: %s", r.Seq, key, r.Data))
			}
			delete(now, r.Machine)
		}
	}
	return now, lost
}

// failures returns the generations that failed to take another one's place and are to be
// kept, as far as the records tell, without those that a record removes.
func failures(records []ledger.Record, held map[lab.Name]int) (kept []lab.Generation, err error) {
	keeps := map[lab.Generation]bool{}
	for _, r := range records {
		g := lab.Generation{Machine: r.Machine, Number: r.Generation}
		switch r.Type {
		case ledger.MachineCreate:
			var d ledger.Create
			if err := json.Unmarshal(r.Data, &d); err != nil {
				return nil, err
			}
			keeps[g] = d.Spec.Machine(r.Machine).Replace.OnFailure != lab.DiscardFailed
		case ledger.MachineFailed:
			if keeps[g] && g.Number > held[g.Machine] && held[g.Machine] != 0 {
				kept = append(kept, g)
			}
		case ledger.MachineDestroy:
			kept = slices.DeleteFunc(kept, func(k lab.Generation) bool { return k == g })
		}
	}
	return kept, nil
}

// world is a lab as it was at one moment.
type world struct {
	what     string
	files    string // a copy of the lab's folder
	provider *memory.Provider
}

// witness is a ledger that keeps the world before and behind every record.
type witness struct {
	book
	b      *bench
	id     lab.ID
	worlds []world
	err    error
}

func (w *witness) Append(r ledger.Record, data any) (ledger.Record, error) {
	w.keep(fmt.Sprintf("before %s of %s@%d", r.Type, r.Machine, r.Generation))
	r, err := w.book.Append(r, data)
	w.keep(fmt.Sprintf("behind %s of %s@%d (record %d)", r.Type, r.Machine, r.Generation, r.Seq))
	return r, err
}

func (w *witness) keep(what string) {
	provider, err := w.b.provider.Fork()
	files := filepath.Join(w.b.t.TempDir(), "lab")
	w.err = errors.Join(w.err, err, copyTree(w.b.Dirs.Lab(w.id), files))
	w.worlds = append(w.worlds, world{what, files, provider})
}

func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if e.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), data, 0o600)
	})
}

// enter makes a world the bench's.
func (b *bench) enter(l *Lab, w world) error {
	err := errors.Join(
		supervise.Stop(b.ctx, b.Dirs, l.ID()), b.empty(l), os.RemoveAll(b.Dirs.Lab(l.ID())), copyTree(w.files, b.Dirs.Lab(l.ID())))
	b.provider, b.watched = w.provider, w.provider
	b.Providers["memory"] = w.provider
	return err
}

// empty ends the machines of the bench's provider.
func (b *bench) empty(l *Lab) error {
	all, err := b.provider.List(b.ctx, l.ID())
	for _, m := range all {
		err = errors.Join(err, b.provider.Destroy(b.ctx, m.Generation))
	}
	return err
}

// loses says what a plan, gc and up would lose of the lab, whatever happened to it.
func (b *bench) loses(l *Lab, w *lab.Lab, named []lab.Name) []string {
	records, err := l.History()
	if err != nil {
		return []string{err.Error()}
	}
	held, lost := holders(records, named)
	volumes, err := l.VolumeNames()
	if err != nil {
		return []string{err.Error()}
	}
	planned, err := l.PlanFor(b.ctx, w, UpOptions{})
	if err != nil {
		return append(lost, "plan: "+err.Error())
	}
	for _, step := range planned.Plan.Steps {
		n := held[step.Machine]
		switch {
		case n == 0 || slices.Contains(named, step.Machine):
		case step.Generation != n:
			lost = append(lost, fmt.Sprintf("the plan takes %s@%d for the present one, not %d: %+v", step.Machine, step.Generation, n, step))
		case step.Action == plan.Create || step.Action == plan.Destroy:
			lost = append(lost, fmt.Sprintf("the plan is to %s %s@%d", step.Action, step.Machine, n))
		case step.Action != plan.Replace && slices.Contains(step.Leftovers, n):
			lost = append(lost, fmt.Sprintf("the plan removes %s@%d: %+v", step.Machine, n, step))
		}
	}
	failed, err := failures(records, held)
	if err != nil {
		return append(lost, err.Error())
	}
	failed = slices.DeleteFunc(failed, func(g lab.Generation) bool { // a new replacement removes them
		return slices.ContainsFunc(planned.Plan.Steps, func(s plan.Step) bool {
			return s.Machine == g.Machine && (s.Action == plan.Replace || s.Action == plan.Destroy)
		})
	})
	garbage, err := b.GC(b.ctx, true)
	if err != nil {
		lost = append(lost, "gc: "+err.Error())
	}
	for _, g := range garbage {
		if slices.ContainsFunc(failed, func(f lab.Generation) bool { return g.Name == fmt.Sprintf("%s %s", l.ID(), f) }) {
			lost = append(lost, fmt.Sprintf("gc removes the failed %s: %s", g.Name, g.Why))
		}
	}
	for _, g := range garbage {
		for name, n := range held {
			if g.Name == fmt.Sprintf("%s %s@%d", l.ID(), name, n) && !slices.Contains(named, name) {
				lost = append(lost, fmt.Sprintf("gc removes %s: %s", g.Name, g.Why))
			}
		}
	}
	if _, err := l.Up(b.ctx, w, UpOptions{Exactly: &planned}); err != nil {
		lost = append(lost, "up: "+err.Error())
	}
	records, err = l.History()
	if err != nil {
		return append(lost, err.Error())
	}
	held, more := holders(records, named)
	there := b.there(l)
	for name, n := range held {
		if !slices.Contains(there, fmt.Sprintf("%s@%d running", name, n)) {
			more = append(more, fmt.Sprintf("%s@%d does not run after up, only %v", name, n, there))
		}
	}
	state, err := l.read()
	if err != nil {
		return append(lost, err.Error())
	}
	for _, f := range failed {
		if rec, ok := state.Machines[f.Machine].Of(f.Number); !ok || !rec.Retired || !slices.Contains(there, f.String()+" stopped") {
			more = append(more, fmt.Sprintf("the failed %s is not kept: %v", f, there))
		}
	}
	if after, err := l.VolumeNames(); err != nil || !slices.Equal(volumes, after) {
		more = append(more, fmt.Sprintf("the volumes were %v and are %v: %v", volumes, after, err))
	}
	for _, what := range more {
		if !slices.Contains(lost, what) {
			lost = append(lost, what)
		}
	}
	return lost
}

// begin makes the world that a change begins with.
func (c change) begin(b *bench) (*Lab, *lab.Lab) {
	b.t.Helper()
	l, w := b.open(), c.setup(b)
	b.up(l, w)
	if c.more != nil {
		if err := c.more(b, l, w); err != nil {
			b.t.Fatal(err)
		}
	}
	return l, w
}

// A command may be killed at any moment. Whatever plan, gc and up make of what it
// leaves, a generation that was ready is there until another one is ready in its place,
// or the user wants it gone.
func TestKilledCommandsLoseNothing(t *testing.T) {
	for _, c := range kindsOfChange() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			l, w := c.begin(b)
			seen := &witness{book: l.book, b: b, id: l.ID()}
			l.book = seen
			if err := c.do(b, l, w); (err != nil) != c.fails {
				t.Fatalf("it ended with %v", err)
			}
			l.book = seen.book
			if seen.err != nil {
				t.Fatal(seen.err)
			}
			if len(seen.worlds) < 2 {
				t.Fatalf("it wrote %d records", len(seen.worlds)/2)
			}
			for _, cut := range seen.worlds {
				if err := b.enter(l, cut); err != nil {
					t.Fatal(err)
				}
				for _, what := range b.loses(l, w, c.named) {
					t.Errorf("killed %s: %s", cut.what, what)
				}
			}
		})
	}
}

// full is a ledger on a disk that is full at the n-th record, or from then on.
type full struct {
	book
	mu   sync.Mutex
	at   int
	once bool
	n    int
}

var errFull = errors.New("no space left on device")

func (f *full) Append(r ledger.Record, data any) (ledger.Record, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n++
	if f.n == f.at || f.n > f.at && !f.once {
		return ledger.Record{}, errFull
	}
	return f.book.Append(r, data)
}

// The same holds if a record cannot be written, and the command goes on.
func TestFullDiskLosesNothing(t *testing.T) {
	for _, c := range kindsOfChange() {
		for _, once := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, once %v", c.name, once), func(t *testing.T) {
				t.Parallel()
				for at := 1; ; at++ {
					b := newBench(t)
					l, w := c.begin(b)
					disk := &full{book: l.book, at: at, once: once}
					l.book = disk
					err := c.do(b, l, w)
					l.book = disk.book
					for _, what := range b.loses(l, w, c.named) {
						t.Errorf("no space for record %d: %s (it ended with %v)", at, what, err)
					}
					if err := l.Destroy(b.ctx, Options{Volumes: true}); err != nil {
						t.Fatal(err)
					}
					if disk.n < at {
						return
					}
				}
			})
		}
	}
}
