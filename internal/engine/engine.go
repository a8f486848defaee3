// SPDX-License-Identifier: Apache-2.0

// Package engine carries plans out: it boots, stops, replaces and destroys the
// machines of a lab in dependency order, records what it does, and tells what
// it sees. The command line is a thin layer above it.
package engine

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/labfile"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/proxy"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/internal/verify"
	"github.com/labfile/lab/providers"
)

// DefaultProvider is the provider of a Labfile that names none.
const DefaultProvider = "qemu"

// Host is what all labs of a user share.
type Host struct {
	Dirs      dirs.Dirs
	Providers map[string]providers.Provider // by name
	Boxes     Boxes
	Spawn     func(id lab.ID) error // starts the lab's supervisor, detached
	Agent     func() []byte         // lab-agent, for guests that do not carry it; nil, or returns nil, if there is none
	Log       *slog.Logger
	Parallel  int // machines to boot at once; 0 means no limit

	Getenv func(string) string // the proxy settings for guests; nil has none

	// Patience is how long a guest without an agent may take to let lab in when it
	// is asked for a favour, such as to write its disk; 0 means 30 seconds.
	Patience time.Duration
}

// Lab is one lab of the host, which may or may not exist yet. Its methods may be
// called by several goroutines.
type Lab struct {
	host *Host
	id   lab.ID
	book book
}

// book is where a lab's records are kept: a *ledger.Ledger, but for tests that cut it.
type book interface {
	Append(r ledger.Record, data any) (ledger.Record, error)
	Read() ([]ledger.Record, error)
	Exists() bool
}

// Lab returns the lab called id. It touches nothing.
func (h *Host) Lab(id lab.ID) *Lab {
	return &Lab{host: h, id: id, book: ledger.Open(h.Dirs.Ledger(id))}
}

// ID returns the lab's ID.
func (l *Lab) ID() lab.ID { return l.id }

// Options are what every changing operation takes.
type Options struct {
	Machines []lab.Name            // only these; empty for all
	Events   func(Event)           // told what happens, one call at a time; may be nil
	Command  string                // what the user typed: for the ledger, and for others who find the lab locked
	Confirm  func(plan.Plan) error // called once before anything is changed; an error stops it; may be nil
	Volumes  bool                  // the volumes go, too; Destroy alone looks at it
	Force    bool                  // cut the power of machines that cannot be asked to shut down; Stop and Destroy look at it

	// Checked is told the results of the Labfile's checks that a birth carried out, all of
	// a machine at once, also if some failed; one call at a time. It may be nil.
	Checked func(lab.Name, []verify.Result)

	due *Due // what made the clock ask for this; nil if somebody did
}

// UpOptions are the options of Plan, Up and Rebuild.
type UpOptions struct {
	Options
	Locked  bool     // refuse to run with a stale lock file
	Exactly *Planned // carry this plan out, or nothing; Up alone looks at it
}

// Stage is a moment in the life of a machine that is worth telling.
type Stage string

// The stages.
const (
	StageBox        Stage = "box" // a box is fetched or built; Event.Box names it
	StageCreate     Stage = "create"
	StageBoot       Stage = "boot"
	StageIdentity   Stage = "identity"  // the guest learns who it is
	StageBootStep   Stage = "boot-step" // a step of boot runs; it ends with an event that has taken time
	StageCheck      Stage = "check"     // a readiness check is waited for
	StageVerify     Stage = "verify"    // one of the Labfile's checks has been carried out
	StageBirth      Stage = "birth"     // its disk is frozen as it is
	StageHandover   Stage = "handover"  // a generation takes over from another
	StageReady      Stage = "ready"     // ends create, start and replace
	StageKept       Stage = "kept"
	StageChanged    Stage = "changed" // applied in place
	StageStop       Stage = "stop"
	StageStopped    Stage = "stopped"
	StageDestroy    Stage = "destroy"
	StageDestroyed  Stage = "destroyed"
	StageFailed     Stage = "failed"
	StageSkipped    Stage = "skipped"    // what it depends on failed
	StageUndone     Stage = "undone"     // interrupted, and destroyed again
	StageSupervisor Stage = "supervisor" // the supervisor was brought back
	StageNote       Stage = "note"       // something the user should know, once
)

// Event is something that happened.
type Event struct {
	Time        time.Time
	Machine     lab.Name // empty if it is about the lab or a box
	Generation  int
	Box         string
	Stage       Stage
	Text        string // in a few words, lower case
	Done, Total int64  // progress in bytes, if Total is positive
	Err         error
	Took        time.Duration // of what the stage ends
}

// session is one changing operation on a lab: the lock is held while it lives.
type session struct {
	*Lab
	opt      Options
	provider providers.Provider
	state    ledger.State
	observed map[lab.Name][]providers.Machine
	lock     *lock
	fresh    bool // the lab did not exist before
	asOf     bool // the Labfile was not looked at: what is wanted is what was recorded

	pins   labfile.Lock // the lock file as it should be
	pinned []LockChange // how that differs from the file

	machines  []lab.Machine           // of the lab that is wanted, once a plan is carried out
	auto      map[lab.Name]bool       // machines whose Labfile leaves open what connects them
	addresses map[lab.Name]netip.Addr // of all machines, once a plan is carried out
	forced    string                  // what ends a machine by force that cannot be asked to shut down; empty for "lab stop"
	rollback  int                     // the generation that the one to be born goes back to; 0 if none

	baking   *lab.Lab      // what is wanted by a command that touches no machine; nil for others
	relays   []proxy.Relay // that guests are told of, or need
	renumber bool          // every guest that runs is told of them, so that their ports may change
	untold   bool          // a guest could not be told

	undone map[lab.Name]string // what resume would undo, in words

	made   []string          // volumes
	looked map[string]string // why disks can't be read from outside, by their layers

	mu        sync.Mutex // guards the events, the ledger, state, untold and looked
	superOnce sync.Mutex // guards super
	super     *supervise.Client
}

// begin locks the lab, reads its ledger, looks at its machines, and undoes what a
// command that was killed left half done. want may be nil; it chooses the provider of a lab that was not opened yet.
func (l *Lab) begin(ctx context.Context, want *lab.Lab, opt Options) (*session, error) {
	lk, err := l.acquire(opt.Command)
	if err != nil {
		return nil, err
	}
	s := &session{Lab: l, opt: opt, lock: lk, fresh: !l.book.Exists()}
	err = s.look(ctx, want)
	if err == nil {
		err = s.resume(ctx)
	}
	if err == nil {
		err = s.stillDue(ctx)
	}
	if err != nil {
		s.end()
		return nil, err
	}
	return s, nil
}

// look reads the ledger and looks at the machines. A session that has not the lock
// sees them as one that has would after resume.
func (s *session) look(ctx context.Context, want *lab.Lab) error {
	state, err := s.read()
	if err != nil {
		return err
	}
	s.state = state
	opened := state.Opened
	if want != nil {
		if opened, err = s.host.choose(opened, want, len(state.Names()) > 0); err != nil {
			return fmt.Errorf("lab %s: %w", s.id, err)
		}
	}
	if s.provider, err = s.host.Provider(opened); err != nil {
		return err
	}
	if s.observed, err = observe(ctx, s.provider, s.id); err != nil || s.lock != nil {
		return err
	}
	return s.presume()
}

func (s *session) end() {
	if s.super != nil {
		s.super.Close()
	}
	if s.fresh && !s.book.Exists() { // it came to nothing, so that not even the lock is left
		s.lock.remove()
	}
	s.lock.release()
}

// emit tells the event to whoever listens.
func (s *session) emit(e Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	emit(s.opt.Events, e)
}

func emit(listener func(Event), e Event) {
	if listener == nil {
		return
	}
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	listener(e)
}

// record appends to the ledger and folds the record into the session's state.
func (s *session) record(t ledger.Type, g lab.Generation, data any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := s.book.Append(ledger.Record{
		Type: t, Command: s.opt.Command, Machine: g.Machine, Generation: g.Number,
	}, data)
	if err != nil {
		return err
	}
	return s.state.Apply(r)
}

// machine returns what the ledger says of a machine.
func (s *session) machine(name lab.Name) ledger.Machine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state.Machines[name]
}

// read folds the lab's ledger.
func (l *Lab) read() (ledger.State, error) {
	records, err := l.book.Read()
	if err != nil {
		return ledger.State{}, err
	}
	return ledger.Fold(records)
}

// choose returns what runs the lab that is wanted, given what runs it now; used says
// that it has machines. Those stay where they are if nobody says where they belong.
func (h *Host) choose(now ledger.Opened, want *lab.Lab, used bool) (ledger.Opened, error) {
	next := ledger.Opened{Provider: orDefault(want.Provider), URI: want.URI}
	if used && want.Provider == "" && now.Provider != "" {
		next.Provider = now.Provider
	}
	if next.URI == "" && now.Provider == next.Provider {
		next.URI = now.URI
	}
	p, err := h.Provider(next)
	if err != nil {
		return next, err
	}
	if a, ok := p.(providers.Addressed); ok {
		next.URI = a.URI()
	}
	switch {
	case !used || now.Provider == "" || now.Provider == next.Provider && now.URI == next.URI:
		return next, nil
	case now.Provider != next.Provider:
		return next, fmt.Errorf("runs on provider %q and cannot move to %q: destroy it first", now.Provider, next.Provider)
	}
	return next, fmt.Errorf("runs at %s and cannot move to %s: destroy it first", now.URI, next.URI)
}

// Provider returns the provider that runs a lab.
func (h *Host) Provider(o ledger.Opened) (providers.Provider, error) {
	name := orDefault(o.Provider)
	p, ok := h.Providers[name]
	if !ok {
		return nil, &noProviderError{name}
	}
	if o.URI == "" {
		return p, nil
	}
	a, ok := p.(providers.Addressed)
	if !ok {
		return nil, fmt.Errorf("provider %q has no uri; leave out %q", name, o.URI)
	}
	return a.At(o.URI)
}

// noProviderError says that nothing runs machines under that name.
type noProviderError struct{ name string }

func (e *noProviderError) Error() string { return fmt.Sprintf("there is no provider %q", e.name) }

// Hint is the next step.
func (e *noProviderError) Hint() string { return "choose qemu or libvirt" }

func orDefault(provider string) string {
	if provider == "" {
		return DefaultProvider
	}
	return provider
}

// observe lists the lab's generations by machine. Throw-away machines of a bake are
// nobody's business but the bake's.
func observe(ctx context.Context, p providers.Provider, id lab.ID) (map[lab.Name][]providers.Machine, error) {
	all, err := p.List(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("listing the machines of %s: %w", id, err)
	}
	seen := map[lab.Name][]providers.Machine{}
	for _, m := range all {
		if lab.BakeName(m.Machine) {
			continue
		}
		seen[m.Machine] = append(seen[m.Machine], m)
	}
	return seen, nil
}

// cleanupTime bounds what is done after an interruption.
const cleanupTime = 60 * time.Second

// cleanup returns a context that outlives ctx's cancellation, for undoing.
func cleanup(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
}

// interrupted reports whether err came from the end of ctx. Somebody else's
// cancelled context, such as the supervisor's, is an error like any other.
func interrupted(ctx context.Context, err error) bool {
	return err != nil && ctx.Err() != nil
}
