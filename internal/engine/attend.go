// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// answerTime bounds one question to a guest that was heard before, and firstAnswerTime
// one to a guest that was not: it may be booting, which is no silence.
const (
	answerTime      = 30 * time.Second
	firstAnswerTime = time.Second
)

// errStandsStill is why a machine is not asked: it is paused.
var errStandsStill = errors.New("the machine is paused")

// Silence is why a machine that is waited for does not go on.
type Silence struct {
	Paused bool   // its processors are halted
	Text   string // what is told of it: "is paused: …", "does not answer"
}

// Attention is what to tell of a machine that something waits for.
type Attention struct {
	// Tell is called with a *Silence within five seconds after the machine has fallen
	// silent, and with nil when it goes on. Of one that is switched off while it is silent,
	// nothing more is told. One call at a time.
	Tell func(*Silence)
	// Expected says that the machine should answer already. Of one that may be booting,
	// silence is told only after it was heard.
	Expected bool
	// Leaving says that the machine shuts down: only a pause is told, since it stops
	// answering anyway.
	Leaving bool
	// Heard and Sent, if they are known, spare a machine that says something, or says
	// nothing because it is sent much, the question: see guest.Pulse.
	Heard func() time.Time
	Sent  func() int64
}

// Attend watches whether a machine goes on, until ctx ends: its present generation at
// the beginning. It does not count as a use of the machine. Errors: ErrNoLab,
// *NoMachineError.
func (l *Lab) Attend(ctx context.Context, name lab.Name, a Attention) error {
	m, p, err := l.known(name)
	if err != nil {
		return err
	}
	g := lab.Generation{Lab: l.id, Machine: name, Number: m.Generation}
	newAttendant(l, p, g, a).watch(ctx)
	return nil
}

// attend is Attend for a generation, in the background and told as events. The function
// that it returns ends it.
func (s *session) attend(ctx context.Context, g lab.Generation, a Attention) (*attendant, func()) {
	a.Tell = func(why *Silence) {
		s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageNote, Text: why.Waiting()})
	}
	return newAttendant(s.Lab, s.provider, g, a).start(ctx)
}

// start is watch in the background.
func (t *attendant) start(ctx context.Context) (*attendant, func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		t.watch(ctx)
	}()
	return t, func() {
		cancel()
		<-done
	}
}

// Waiting says it of a machine that is waited for. Nil is one that goes on.
func (s *Silence) Waiting() string {
	if s == nil {
		return "answers again"
	}
	return s.Text + "; waiting for it"
}

// attendant watches one generation: by asking the machine and, where there are any, by
// the logins to it.
type attendant struct {
	l *Lab
	p providers.Provider
	g lab.Generation
	a Attention

	mu     sync.Mutex
	met    bool         // it has answered since it was switched on
	silent map[any]bool // what hears nothing of it
	told   bool
	lost   bool // when it was asked last, it was off or not plugged in, or could not be inspected
}

func newAttendant(l *Lab, p providers.Provider, g lab.Generation, a Attention) *attendant {
	return &attendant{l: l, p: p, g: g, a: a, silent: map[any]bool{}}
}

// watch returns when ctx ends.
func (t *attendant) watch(ctx context.Context) {
	pulse := guest.Pulse{Ask: t.ask, Heard: t.a.Heard, Sent: t.a.Sent}
	pulse.Watch(ctx, func(silent bool) { t.changed(ctx, t, silent) })
}

// login has the attendant watch a login too, until that or ctx ends.
func (t *attendant) login(ctx context.Context, c *guest.Client) {
	t.heard(ctx)
	go func() {
		c.Watch(ctx, func(silent bool) { t.changed(ctx, c, silent) })
		t.ended(c)
	}()
}

// ended forgets what hears nothing any more because it is over.
func (t *attendant) ended(by any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.silent, by)
}

// watched has the attendant watch every login to a target, until ctx ends.
func (t *attendant) watched(ctx context.Context, target guest.Target) guest.Target {
	target.LoggedIn = func(c *guest.Client) { t.login(ctx, c) }
	return target
}

// ask returns nil if the machine has answered, or if nobody can say whether it would:
// it is off, or not plugged in.
func (t *attendant) ask(ctx context.Context) error {
	m, err := t.p.Inspect(ctx, t.g)
	paused := err == nil && m.State == providers.StatePaused
	off := err == nil && !paused && (m.State != providers.StateRunning || m.Unreachable != "")
	t.mu.Lock()
	t.lost = err != nil || off
	t.met = t.met && !off
	t.mu.Unlock()
	switch {
	case err != nil || off:
		return nil
	case paused:
		return errStandsStill
	case t.a.Leaving:
		return nil
	}
	t.mu.Lock()
	met := t.met || t.a.Expected
	t.mu.Unlock()
	limit := answerTime
	if !met {
		limit = firstAnswerTime
	}
	asked, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	super, err := supervise.Dial(asked, t.l.host.Dirs, t.l.id)
	if err != nil { // the command that asks it for something tells its silence
		return nil
	}
	defer super.Close()
	err = super.Answer(asked, t.g)
	switch {
	case err == nil:
		t.mu.Lock()
		t.met = true
		t.mu.Unlock()
		return nil
	case asked.Err() != nil && met:
		return err
	}
	return nil // nobody to ask, or a guest that boots
}

// changed is called when something does not hear the machine any more, or does again.
func (t *attendant) changed(ctx context.Context, by any, silent bool) {
	if !silent {
		t.mu.Lock()
		delete(t.silent, by)
		lost := by == t && t.lost
		if lost && len(t.silent) == 0 { // its silence is over, but it does not go on
			t.told = false
		}
		t.mu.Unlock()
		if !lost {
			t.heard(ctx)
		}
		return
	}
	why := silence(ctx, t.p, t.g)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.silent[by] = true
	if !t.told && ctx.Err() == nil {
		t.told = true
		t.a.Tell(why)
	}
}

// heard tells that the machine goes on, if it was told that it does not.
func (t *attendant) heard(ctx context.Context) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.told && len(t.silent) == 0 && ctx.Err() == nil {
		t.told = false
		t.a.Tell(nil)
	}
}

// silentText is what is told of a machine that nobody knows more of.
const silentText = "does not answer"

// silence says why a generation that was heard does not answer now.
func silence(ctx context.Context, p providers.Provider, g lab.Generation) *Silence {
	m, err := p.Inspect(ctx, g)
	switch {
	case err != nil || m.State != providers.StatePaused:
		return &Silence{Text: silentText}
	case m.Reason != "":
		return &Silence{Paused: true, Text: "is paused: " + m.Reason}
	}
	return &Silence{Paused: true, Text: "is paused"}
}
