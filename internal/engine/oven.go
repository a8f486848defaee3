// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/labfile/lab/internal/bake"
	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// bakeHost is the host name of every throw-away machine with an agent: what a step
// makes of it should not differ from bake to bake.
const bakeHost = "bake"

// run bakes layers in one throw-away machine, from the first that is missing: all,
// or until somebody else bakes the next one. lock is that of the first.
func (o *oven) run(ctx context.Context, j *job, c bake.Chain, lock *bake.Lock, last byte) error {
	s := o.s
	defer func() { lock.Unlock() }()
	var id [3]byte
	_, _ = rand.Read(id[:]) // never fails: see crypto/rand
	g := lab.Generation{Lab: s.id, Machine: lab.Name(lab.BakePrefix + hex.EncodeToString(id[:])), Number: 1}
	defer func() {
		sure, cancel := cleanup(ctx)
		defer cancel()
		if err := o.discard(sure, g); err != nil {
			s.emit(Event{Stage: StageNote, Text: fmt.Sprintf("the throw-away machine %s is left: %v", g.Machine, err), Err: err})
		}
	}()
	first := c.Count
	attendant, leave := s.attend(ctx, g, Attention{})
	defer leave()
	m, closeAll, err := o.boot(ctx, j, g, c, last, attendant)
	if err != nil {
		return o.failed(ctx, j, first, err)
	}
	defer closeAll()
	for i := first; i < len(j.steps); i++ {
		l := j.img.Layers[i]
		if i > first {
			next, err := o.store.TryLock(l.Key)
			lock.Unlock()
			lock = next
			if err != nil || next == nil {
				return err
			}
			if now := o.chain(j); now.Count != i || j.img.limits[i] != j.img.limits[first] {
				return nil // it is there already, or its disk may be larger
			}
			if err := m.Restore(ctx); err != nil {
				return o.failed(ctx, j, i, err)
			}
		}
		if err := o.watched(ctx, g, func(ctx context.Context) error { return o.step(ctx, j, i, g, m) }); err != nil {
			return o.failed(ctx, j, i, err)
		}
	}
	return nil
}

// watched does something in a machine, and gives up if its hypervisor halts it.
func (o *oven) watched(ctx context.Context, g lab.Generation, do func(context.Context) error) error {
	alive, died := context.WithCancelCause(ctx)
	defer died(nil)
	go o.s.watchPause(alive, g, died)
	err := do(alive)
	var end *endError
	if err != nil && errors.As(context.Cause(alive), &end) && ctx.Err() == nil {
		return end
	}
	return err
}

// failed records that a step failed, unless that was an interruption.
func (o *oven) failed(ctx context.Context, j *job, i int, err error) error {
	if interrupted(ctx, err) {
		return err
	}
	e := &StepError{Key: "provision", Place: j.steps[i].Place, Step: i + 1, Of: len(j.steps), Text: j.steps[i].String(), Err: err}
	var f *bake.FailedError
	if errors.As(err, &f) {
		e.Code, e.Output = f.Code, f.Output
	}
	rerr := o.s.record(ledger.ImageFailed, lab.Generation{}, ledger.BakeFailed{
		Key: j.img.Layers[i].Key, Text: e.Text, Place: e.Place, Code: e.Code, Error: err.Error(),
	})
	e.Err = errors.Join(err, rerr)
	return e
}

// parent is the key of the layer below layer i, or the box.
func (j *job) parent(i int) string {
	if i == 0 {
		return j.img.Box
	}
	return j.img.Layers[i-1].Key
}

// step runs one step and stores its layer.
func (o *oven) step(ctx context.Context, j *job, i int, g lab.Generation, m *bake.Machine) error {
	s, l, began := o.s, j.img.Layers[i], time.Now()
	err := s.record(ledger.ImageBake, lab.Generation{}, ledger.Bake{
		Key: l.Key, Parent: j.parent(i), Text: l.Text, Machines: j.machines,
	})
	if err != nil {
		return err
	}
	text := fmt.Sprintf("step %d of %d: %s", i+1, len(j.steps), l.Text)
	o.tell(j, text, 0)
	if err := m.Run(ctx, j.steps[i], l, func(line string) { o.tell(j, line, 0) }); err != nil {
		return err
	}
	o.tell(j, "storing "+text, 0)
	if err := m.Clean(ctx, i+1 < len(j.steps)); err != nil {
		return err
	}
	freezer, ok := s.provider.(providers.Freezer)
	if !ok {
		return providers.ErrIncapable
	}
	frozen, err := freezer.Snapshot(ctx, g)
	if err != nil {
		return err
	}
	below := o.chain(j)
	if below.Count != i {
		return errors.New("the layers below it were removed meanwhile")
	}
	took := since(began)
	if _, err := o.store.Put(ctx, below, j.parent(i), l, frozen.Layers, frozen.Size, took); err != nil {
		return err
	}
	o.mu.Lock()
	o.fresh[l.Key] = true
	o.mu.Unlock()
	o.tell(j, "baked "+text, took)
	return s.record(ledger.ImageBaked, lab.Generation{}, ledger.Baked{Key: l.Key, Parent: j.parent(i), Text: l.Text, Took: took})
}

// boot makes a throw-away machine from what is there of the image and logs in. What
// it returns closes the login.
func (o *oven) boot(ctx context.Context, j *job, g lab.Generation, c bake.Chain, last byte, attendant *attendant) (*bake.Machine, func(), error) {
	s, img := o.s, j.img.on(c)
	addr := lab.NetworkOf(s.id).Host(last)
	role := lab.Machine{Name: g.Machine, CPUs: j.cpus, Memory: j.memory, User: j.login, Network: j.network}
	direct, err := s.direct(ctx, role.Network, addr, 1)
	if err != nil {
		return nil, nil, err
	}
	create := ledger.Create{Spec: ledger.SpecOf(role), Address: addr, Agent: img.Agent, User: img.User, Direct: direct}
	img.Image.Digest = j.img.Box // so that the box stays while the machine is there
	if limit := j.img.limits[c.Count]; limit > img.Size {
		role.Disk = limit
	}
	o.tell(j, fmt.Sprintf("booting a throw-away machine for step %d of %d", c.Count+1, len(j.steps)), 0)
	spec, err := s.spec(g, role, img, create)
	if err != nil {
		return nil, nil, err
	}
	if err := s.provider.Create(ctx, spec); err != nil {
		return nil, nil, err
	}
	super, err := s.supervisor(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := s.provider.Start(ctx, g); err != nil {
		return nil, nil, err
	}
	mc := supervise.Machine{Generation: g, Addr: addr, Agent: img.Agent, Hidden: true}
	if _, err := super.Plug(ctx, mc); err != nil {
		return nil, nil, err
	}
	alive, died := context.WithCancelCause(ctx)
	defer died(nil)
	go func() {
		if exit, err := s.provider.Wait(alive, g); err == nil {
			died(&endError{"ended before anything was run in it: " + orUnknown(exitText(ledger.Exited{Reason: string(exit.Reason), Detail: exit.Detail}))})
		}
	}()
	go s.watchPause(alive, g, died)
	client, err := o.login(alive, g, create, func(c *guest.Client) { attendant.login(ctx, c) })
	if err != nil {
		var end *endError
		if errors.As(context.Cause(alive), &end) && ctx.Err() == nil {
			err = end
		}
		return nil, nil, fmt.Errorf("booting the throw-away machine: %w", err)
	}
	key, err := s.labKey()
	if err != nil {
		client.Close()
		return nil, nil, err
	}
	proxies, err := s.proxies()
	if err != nil {
		client.Close()
		return nil, nil, err
	}
	name := bakeHost
	if !img.Agent {
		name = string(g.Machine)
	}
	m := &bake.Machine{
		Guest: client, User: user(create), Sudo: user(create) != "root", Hostname: name,
		Key: guest.AuthorizedKey(key.Signer.PublicKey()), Dir: o.dir, Env: proxies.Env,
	}
	if err := m.Settle(alive); err != nil {
		client.Close()
		return nil, nil, err
	}
	return m, func() { client.Close() }, nil
}

// login tells the guest who it is, or waits until it knows, and logs in.
func (o *oven) login(ctx context.Context, g lab.Generation, c ledger.Create, loggedIn func(*guest.Client)) (*guest.Client, error) {
	target, err := o.s.Lab.target(g.Machine, c, "") // only steps get proxies: see bake.Machine
	if err != nil {
		return nil, err
	}
	if c.Agent {
		identity, err := o.s.identity(g, c)
		if err != nil {
			return nil, err
		}
		identity.Hostname = bakeHost
		if err := identify(ctx, target, identity); err != nil {
			return nil, err
		}
	} else {
		checks := []lab.Check{{Kind: lab.CheckSSH, Timeout: bootTimeout, Interval: time.Second}}
		if err := guest.WaitReady(ctx, target, checks, nil, nil); err != nil {
			return nil, err
		}
	}
	target.LoggedIn = loggedIn
	return guest.Connect(ctx, target)
}

// discard removes a throw-away machine and its key.
func (o *oven) discard(ctx context.Context, g lab.Generation) error {
	err := o.s.unplug(ctx, g)
	err = errors.Join(err, o.s.provider.Destroy(ctx, g))
	if kerr := os.Remove(o.s.keyFile("host_" + string(g.Machine))); kerr != nil && !errors.Is(kerr, os.ErrNotExist) {
		err = errors.Join(err, kerr)
	}
	return err
}
