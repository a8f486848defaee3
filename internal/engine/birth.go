// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/proxy"
	"github.com/labfile/lab/internal/verify"
	"github.com/labfile/lab/providers"
)

// makeDirs makes the lab's directories.
func (l *Lab) makeDirs() error {
	d := l.host.Dirs
	for _, dir := range []string{d.Lab(l.id), d.Keys(l.id), d.Machines(l.id)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("making the lab's directory: %w", err)
		}
	}
	if err := d.Claim(l.id); err != nil {
		return err
	}
	if err := os.MkdirAll(d.RunLab(l.id), 0o700); err != nil {
		return fmt.Errorf("making the lab's directory: %w", err)
	}
	return nil
}

// assignAddresses chooses the address of every machine that has none yet. A
// machine keeps its address for as long as the lab lives, across generations.
func (s *session) assignAddresses(p plan.Plan, want *lab.Lab) error {
	taken := map[netip.Addr]bool{}
	s.addresses = map[lab.Name]netip.Addr{}
	network := lab.NetworkOf(s.id)
	for _, m := range want.Machines {
		if m.Address != 0 {
			s.addresses[m.Name] = network.Host(byte(m.Address))
			taken[s.addresses[m.Name]] = true
		}
	}
	for name, m := range s.state.Machines {
		// A machine that is gone yields to one that asks for its address.
		if _, fixed := s.addresses[name]; fixed || m.Phase == ledger.PhaseGone && taken[m.Create.Address] {
			continue
		}
		if _, wanted := want.Machine(name); wanted || m.Phase != ledger.PhaseGone {
			s.addresses[name] = m.Create.Address
			taken[m.Create.Address] = true
		}
	}
	next := lab.FirstHost
	for _, step := range p.Steps {
		if s.addresses[step.Machine].IsValid() || step.Action == plan.Destroy {
			continue
		}
		for next <= lab.LastHost && taken[network.Host(byte(next))] {
			next++
		}
		if next > lab.LastHost {
			return fmt.Errorf("a lab has room for %d machines", lab.LastHost-lab.FirstHost+1)
		}
		s.addresses[step.Machine] = network.Host(byte(next))
		next++
	}
	return nil
}

// birth makes a generation and waits until it is ready. A generation that does
// not become ready is kept, for inspection.
func (s *session) birth(ctx context.Context, l launch, img Image, why []string, born func()) error {
	g, m := l.Generation, l.m
	l.began = time.Now()
	direct, err := s.direct(ctx, m.Network, s.addresses[g.Machine], slot(s.machine(g.Machine), l.beside))
	if err != nil {
		return err
	}
	create := ledger.Create{
		Spec: ledger.SpecOf(m), Address: s.addresses[g.Machine], Image: img.Digest,
		Agent: img.Agent, User: img.User, Why: why, Box: img.Box, Layers: img.Layers,
		From: img.From, Rollback: s.rollback, Standby: l.beside, Vagrant: img.Vagrant, Direct: direct,
	}
	born()
	if err := s.record(ledger.MachineCreate, g, create); err != nil {
		return err
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageCreate, Text: "creating from " + m.Box})
	spec, err := s.spec(g, m, img, create)
	if err != nil {
		return s.fail(ctx, g, StageCreate, err)
	}
	if err := s.provider.Create(ctx, spec); err != nil {
		return s.fail(ctx, g, StageCreate, err)
	}
	l.unreadable = s.unreadable(img)
	return s.boot(ctx, l)
}

// launch is one boot of a generation.
type launch struct {
	lab.Generation
	m       lab.Machine
	began   time.Time
	newborn bool // its disk is frozen when it is ready, and it must pass the Labfile's checks
	beside  bool // it stands by beside the present generation

	unreadable string // why its disk can't be read from outside; empty if it can
}

// spec is what the provider needs to make the generation.
func (s *session) spec(g lab.Generation, m lab.Machine, img Image, c ledger.Create) (providers.Spec, error) {
	spec := providers.Spec{
		Generation: g, Image: img.Image, CPUs: m.CPUs, Memory: m.Memory, Disk: m.Disk,
		MAC: lab.MACOf(c.Address), Agent: img.Agent, Append: early(img, m), Network: m.Network, Direct: c.Direct.Addr(),
	}
	if img.Agent && m.UserData == "" || img.Vagrant {
		return spec, nil
	}
	identity, err := s.identity(g, c)
	if err != nil {
		return spec, err
	}
	var proxies proxy.Guest
	if !lab.BakeName(g.Machine) { // nothing of it is to be left in an image
		if proxies, err = s.proxies(); err != nil {
			return spec, err
		}
	}
	spec.Seed, err = guest.Seed(guest.SeedConfig{
		Identity: identity, InstanceID: fmt.Sprintf("%s-%s-%d", s.id, g.Machine, g.Number),
		User: user(c), UserData: m.UserData, AgentRuns: img.Agent,
		Proxy: proxies.Env,
	})
	if err != nil {
		return spec, fmt.Errorf("making the seed: %w", err)
	}
	if len(proxies.Env) == 0 {
		return spec, nil
	}
	return spec, s.recordProxied(g, true)
}

// boot starts a generation, plugs it in, tells it who it is and waits until it
// is ready.
func (s *session) boot(ctx context.Context, l launch) error {
	g := l.Generation
	doing := "booting"
	if slices.ContainsFunc(s.observed[g.Machine], func(m providers.Machine) bool { return m.Generation == g && m.State == providers.StatePaused }) {
		doing = "letting it go on"
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageBoot, Text: doing})
	super, err := s.supervisor(ctx)
	if err != nil {
		return s.fail(ctx, g, StageBoot, err)
	}
	free, err := s.attach(ctx, g, l.m)
	if err == nil {
		err = s.provider.Start(ctx, g)
	}
	free()
	if err != nil {
		return s.fail(ctx, g, StageBoot, err)
	}
	rec, _ := s.machine(g.Machine).Of(g.Number)
	mc := cable(g, l.m, rec.Create)
	mc.Standby = l.beside
	bound, err := plug(ctx, super, mc, rec.Ports)
	if err != nil {
		return s.fail(ctx, g, StageBoot, err)
	}
	// A machine that dies has no use for the rest of its deadlines.
	alive, died := context.WithCancelCause(ctx)
	defer died(nil)
	go func() {
		if exit, err := s.provider.Wait(alive, g); err == nil {
			died(&endError{"ended before it was ready: " + orUnknown(exitText(ledger.Exited{Reason: string(exit.Reason), Detail: exit.Detail}))})
		}
	}()
	go s.watchPause(alive, g, died)
	stage, err := s.settle(alive, l, rec.Create)
	if err != nil {
		var end *endError
		if errors.As(context.Cause(alive), &end) && ctx.Err() == nil {
			err = unlived(err, end)
		}
		return s.fail(ctx, g, stage, err)
	}
	took := since(l.began)
	if err := s.record(ledger.MachineReady, g, ledger.Ready{Took: took, Ports: ports(bound)}); err != nil {
		return err
	}
	if l.beside { // it is announced when it has taken over
		return nil
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageReady, Text: readyText(rec.Create.Address, bound), Took: took})
	return nil
}

// endError says why a machine will not become ready, however long one waits.
type endError struct{ why string }

func (e *endError) Error() string { return "the machine " + e.why }

func orUnknown(why string) string {
	if why == "" {
		return "nobody saw why"
	}
	return why
}

// pauseInterval is how often a machine that is waited for is looked at, whether
// its hypervisor halted it. Nothing else tells: a halted guest is just slow.
const pauseInterval = time.Second

// watchPause ends the wait for a machine that its hypervisor halted, as QEMU does
// when the disk is full. One that somebody paused is waited for: an attendant tells that.
func (s *session) watchPause(ctx context.Context, g lab.Generation, halted context.CancelCauseFunc) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pauseInterval):
		}
		m, err := s.provider.Inspect(ctx, g)
		if err != nil {
			continue
		}
		if m.State == providers.StatePaused && m.Reason != "" {
			s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageNote, Text: "is paused: " + m.Reason})
			halted(&endError{"is paused: " + m.Reason})
			return
		}
	}
}

// settle tells the guest who it is and waits until it is ready. A newborn runs its boot
// steps before that; then the Labfile's checks are carried out on it, and its disk is
// frozen. With an error comes the stage that it is from.
func (s *session) settle(ctx context.Context, l launch, c ledger.Create) (Stage, error) {
	stage := StageCheck
	if !c.Agent {
		stage = StageIdentity
	}
	target, err := s.targetOf(l.Generation, c)
	if err != nil {
		return stage, err
	}
	attendant, leave := s.attend(ctx, l.Generation, Attention{})
	defer leave()
	target = attendant.watched(ctx, target)
	if err := s.introduce(ctx, target, l, c); err != nil {
		return stage, err
	}
	if err := s.bootSteps(ctx, target, l, c); err != nil {
		return StageBootStep, err
	}
	if err := s.await(ctx, target, l, c); err != nil || !l.newborn {
		return stage, err
	}
	s.awaitCloudInit(ctx, target, l, c)
	if err := s.verify(ctx, target, l); err != nil {
		return StageCheck, err
	}
	if l.unreadable != "" {
		s.listBirth(ctx, target, l)
	}
	return StageBirth, s.freeze(ctx, l.Generation)
}

// verify carries out the Labfile's checks.
func (s *session) verify(ctx context.Context, target guest.Target, l launch) error {
	if len(l.m.Tests) == 0 {
		return nil
	}
	results, err := verify.Machine(ctx, target, l.m.Tests, func(r verify.Result) {
		text := fmt.Sprintf("check %q: %s", r.Name, r.Outcome)
		if why := r.Why(); why != "" {
			text += ": " + why
		}
		s.emit(Event{Machine: l.Machine, Generation: l.Number, Stage: StageVerify, Text: text})
	})
	if s.opt.Checked != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.opt.Checked(l.Machine, results)
	}
	return err
}

// freeze makes the disk, as it is now, the generation's birth.
func (s *session) freeze(ctx context.Context, g lab.Generation) error {
	f, ok := s.provider.(providers.Freezer)
	if !ok {
		return nil
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageBirth, Text: "freezing its disk"})
	m, _ := s.machine(g.Machine).Of(g.Number)
	s.sync(ctx, m)
	if err := f.Freeze(ctx, g); err != nil {
		return fmt.Errorf("freezing the disk at birth: %w", err)
	}
	return nil
}

// introduce tells the guest who it is, and mounts its volumes and folders.
func (s *session) introduce(ctx context.Context, target guest.Target, l launch, c ledger.Create) error {
	g, m := l.Generation, l.m
	if c.Agent {
		s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageIdentity, Text: "waiting for the guest"})
		identity, err := s.identity(g, c)
		if err != nil {
			return err
		}
		if err := identify(ctx, target, identity); err != nil {
			return fmt.Errorf("giving the guest its identity: %w", err)
		}
	}
	if c.Vagrant {
		if err := s.adopt(ctx, target, g, c); err != nil {
			return err
		}
	}
	if err := s.mount(ctx, target, g, m, c); err != nil {
		return err
	}
	return s.mountFolders(ctx, target, g, m, c)
}

// await waits until the guest's readiness checks pass, and tells it of proxies.
func (s *session) await(ctx context.Context, target guest.Target, l launch, c ledger.Create) error {
	g, checks := l.Generation, l.m.Ready
	if c.Agent {
		if err := s.tellProxies(ctx, g, c); err != nil {
			return err
		}
		return s.waitReady(ctx, target, g, checks)
	}
	if len(checks) == 0 {
		// Without an agent, a login is the first sign of an identity.
		checks = []lab.Check{{Kind: lab.CheckSSH, Timeout: bootTimeout, Interval: time.Second}}
	}
	if err := s.waitReady(ctx, target, g, checks); err != nil {
		return err
	}
	return s.tellProxies(ctx, g, c)
}

// waitReady waits until the checks pass.
func (s *session) waitReady(ctx context.Context, target guest.Target, g lab.Generation, checks []lab.Check) error {
	console := func() (guest.Log, error) { return s.provider.OpenLog(ctx, g, providers.LogConsole) }
	return guest.WaitReady(ctx, target, checks, console, func(check lab.Check, last error) {
		text := "waiting for " + check.String()
		if last != nil {
			text += ": " + last.Error()
		}
		s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageCheck, Text: text})
	})
}

// bootTimeout is how long a guest may take to its first sign of life: a stock
// cloud image under emulation on a busy machine takes minutes.
const bootTimeout = 10 * time.Minute

func identify(ctx context.Context, target guest.Target, identity guest.Identity) error {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	conn, err := target.Agent(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	hello, err := guest.IdentifyHello(ctx, conn, identity)
	if err != nil {
		return err
	}
	if identity.Direct != nil && hello.Identity != identity.Fingerprint() {
		return &oldAgentError{}
	}
	return nil
}

// oldAgentError says that the agent passed over what it does not know.
type oldAgentError struct{}

func (*oldAgentError) Error() string {
	return "the box's lab-agent is older than this lab, and knows nothing of a second network card"
}

// Hint is the next step.
func (*oldAgentError) Hint() string {
	return "\"lab lock --update\" pins the box as this lab builds it; \"network: switch\" in the Labfile does without"
}

// fail records why the generation did not become ready. If it was an
// interruption, that is left to undo.
func (s *session) fail(ctx context.Context, g lab.Generation, stage Stage, err error) error {
	if interrupted(ctx, err) {
		return err
	}
	kept, enterable := false, false
	if m, ierr := s.provider.Inspect(context.WithoutCancel(ctx), g); ierr == nil {
		rec, _ := s.machine(g.Machine).Of(g.Number)
		kept = m.State != providers.StateBroken
		enterable = m.State == providers.StateRunning && rec.Create.Spec.OnShell != lab.ShellForbid
	}
	rerr := s.record(ledger.MachineFailed, g, ledger.Failed{Stage: string(stage), Error: err.Error(), Boot: bootFailed(err)})
	return &MachineError{Machine: g.Machine, Generation: g.Number, Stage: stage, Kept: kept, Enterable: enterable, Err: errors.Join(err, rerr)}
}
