// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/labfile/lab/internal/bake"
	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// StageBake is a provision step that is run in a throw-away machine. It ends with an
// event that has taken time.
const StageBake Stage = "bake"

// BakeError says that a provision step failed. The layers before it are kept.
type BakeError struct {
	Place    string // in the Labfile
	Step, Of int    // the step's number, from 1, and how many there are
	Text     string // the step
	Code     int    // exit code; 0 if it did not end by itself
	Output   []string
	Err      error
}

// Error implements error. The output is not part of it.
func (e *BakeError) Error() string {
	text := fmt.Sprintf("provision step %d of %d (%s): %v", e.Step, e.Of, e.Text, e.Err)
	if e.Place != "" {
		return e.Place + ": " + text
	}
	return text
}

// Unwrap returns the cause.
func (e *BakeError) Unwrap() error { return e.Err }

// oven bakes what one command needs.
type oven struct {
	s      *session
	store  *bake.Store
	dir    string    // that the steps' files are relative to
	spare  chan byte // last bytes of the addresses that throw-away machines can have
	jobs   []*job
	images map[lab.Name]Image
	all    bool // bake every layer, whether it is stored or not
	wg     sync.WaitGroup

	mu    sync.Mutex
	fresh map[string]bool // keys of the layers that this command baked
}

// job is one image to bake, for one machine or for several that share it.
type job struct {
	img      Image
	steps    []lab.Provision
	machines []lab.Name // the first one is what events are told of
	cpus     int
	memory   lab.Bytes
	login    string
	done     chan struct{}
	err      error
}

// Throw-away machines have the addresses behind those of the others.
const (
	firstSpare = lab.LastHost + 1
	lastSpare  = 254
)

// newOven returns an oven for the images of a lab whose Labfile is in dir.
func (s *session) newOven(want *lab.Lab, images map[lab.Name]Image) *oven {
	o := &oven{
		s: s, store: s.host.layers(), dir: filepath.Dir(want.File), images: images,
		spare: make(chan byte, lastSpare-firstSpare+1), fresh: map[string]bool{},
	}
	for b := firstSpare; b <= lastSpare; b++ {
		o.spare <- byte(b)
	}
	return o
}

func (h *Host) layers() *bake.Store { return bake.NewStore(h.Dirs.Layers()) }

// layered returns what each machine is to be born from, by machine, given the boxes
// by name: the box, and the layers on top of it as far as they are baked.
func (s *session) layered(want *lab.Lab, boxes map[string]Image) (map[lab.Name]Image, error) {
	images := map[lab.Name]Image{}
	keys := bake.NewKeys(filepath.Dir(want.File))
	// What is shared must fit on the smallest disk of those that share it.
	limits := map[string]lab.Bytes{}
	var errs []error
	for _, m := range want.Machines {
		img, ok := boxes[m.Box]
		if !ok {
			continue
		}
		if len(m.Provision) > 0 {
			if _, ok := s.provider.(providers.Freezer); !ok {
				return nil, fmt.Errorf("machine %q: %w: provision needs a provider that can freeze disks, which %q cannot", m.Name, providers.ErrIncapable, s.provider.Name())
			}
			layers, err := keys.Layers(img.Box, m.Provision)
			if err != nil {
				errs = append(errs, fmt.Errorf("machine %q: %w", m.Name, err))
				continue
			}
			img.Layers, img.Digest = layers, layers[len(layers)-1].Key
			limit := cmp.Or(m.Disk, img.Size)
			for _, l := range layers {
				if have, ok := limits[l.Key]; !ok || limit < have {
					limits[l.Key] = limit
				}
			}
		}
		images[m.Name] = img
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	store := s.host.layers()
	for name, img := range images {
		for _, l := range img.Layers {
			img.limits = append(img.limits, limits[l.Key])
		}
		images[name] = img.on(store.Chain(img.Box, img.Layers, img.limits))
	}
	return images, nil
}

// on returns the image with the layers that are stored.
func (img Image) on(c bake.Chain) Image {
	img.Missing = len(img.Layers) - c.Count
	img.Image.Digest, img.Image.Layers = img.Digest, c.Disks
	if c.Count > 0 {
		img.Size = c.Size
	}
	return img
}

// start begins to bake what the machines miss. Those that share an image share the
// job.
func (o *oven) start(ctx context.Context, machines []lab.Machine) {
	for _, m := range machines {
		img := o.images[m.Name]
		if len(img.Layers) == 0 || img.Missing == 0 && !o.all {
			continue
		}
		i := slices.IndexFunc(o.jobs, func(j *job) bool { return j.img.Digest == img.Digest })
		if i < 0 {
			i = len(o.jobs)
			o.jobs = append(o.jobs, &job{img: img, steps: m.Provision, login: m.User, done: make(chan struct{})})
		}
		j := o.jobs[i]
		j.machines = append(j.machines, m.Name)
		j.cpus, j.memory = max(j.cpus, m.CPUs), max(j.memory, m.Memory)
	}
	for _, j := range o.jobs {
		o.wg.Add(1)
		go func() {
			defer o.wg.Done()
			defer close(j.done)
			j.err = o.bake(ctx, j)
		}()
	}
}

// image waits until the machine's image is baked, and looks whether it is whole:
// nothing is born from a layer that is damaged or gone.
func (o *oven) image(ctx context.Context, name lab.Name) (Image, error) {
	img := o.images[name]
	if len(img.Layers) == 0 {
		return img, nil
	}
	for _, j := range o.jobs {
		if !slices.Contains(j.machines, name) {
			continue
		}
		select {
		case <-j.done:
		case <-ctx.Done():
			return img, ctx.Err()
		}
		if j.err != nil {
			return img, j.err
		}
	}
	img = img.on(o.store.Chain(img.Box, img.Layers, img.limits))
	if img.Missing > 0 {
		return img, fmt.Errorf("the layer of %q is damaged or gone; try again", img.Layers[len(img.Layers)-img.Missing].Text)
	}
	return img, nil
}

// chain is what is there of a job's image.
func (o *oven) chain(j *job) bake.Chain {
	layers := j.img.Layers
	if o.all {
		o.mu.Lock()
		defer o.mu.Unlock()
		for i, l := range layers {
			if !o.fresh[l.Key] {
				layers = layers[:i]
				break
			}
		}
	}
	return o.store.Chain(j.img.Box, layers, j.img.limits)
}

// bake makes the layers that an image misses. Somebody else may be doing that, too:
// one layer is baked by one at a time, and the others go on from it.
func (o *oven) bake(ctx context.Context, j *job) error {
	for {
		c := o.chain(j)
		if c.Count == len(j.img.Layers) {
			return nil
		}
		lock, err := o.store.Lock(ctx, j.img.Layers[c.Count].Key, func() {
			o.tell(j, 0, fmt.Sprintf("step %d of %d is being baked by somebody else", c.Count+1, len(j.steps)), 0)
		})
		if err != nil {
			return err
		}
		if o.chain(j).Count != c.Count {
			lock.Unlock()
			continue
		}
		select {
		case last := <-o.spare:
			err = o.run(ctx, j, c, lock, last)
			o.spare <- last
		case <-ctx.Done():
			lock.Unlock()
			return ctx.Err()
		}
		if err != nil {
			return err
		}
	}
}

// tell emits an event about a job.
func (o *oven) tell(j *job, number int, text string, took time.Duration) {
	o.s.emit(Event{Machine: j.machines[0], Generation: number, Stage: StageBake, Text: text, Took: took})
}

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
	m, closeAll, err := o.boot(ctx, j, g, c, last)
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
		if err := o.step(ctx, j, i, g, m); err != nil {
			return o.failed(ctx, j, i, err)
		}
	}
	return nil
}

// failed records that a step failed, unless that was an interruption.
func (o *oven) failed(ctx context.Context, j *job, i int, err error) error {
	if interrupted(ctx, err) {
		return err
	}
	e := &BakeError{Place: j.steps[i].Place, Step: i + 1, Of: len(j.steps), Text: j.steps[i].String(), Err: err}
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
	o.tell(j, 0, text, 0)
	if err := m.Run(ctx, j.steps[i], l, func(line string) { o.tell(j, 0, line, 0) }); err != nil {
		return err
	}
	o.tell(j, 0, "storing "+text, 0)
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
	o.tell(j, 0, "baked "+text, took)
	return s.record(ledger.ImageBaked, lab.Generation{}, ledger.Baked{Key: l.Key, Parent: j.parent(i), Text: l.Text, Took: took})
}

// boot makes a throw-away machine from what is there of the image and logs in. What
// it returns closes the login.
func (o *oven) boot(ctx context.Context, j *job, g lab.Generation, c bake.Chain, last byte) (*bake.Machine, func(), error) {
	s, img := o.s, j.img.on(c)
	addr := lab.NetworkOf(s.id).Host(last)
	role := lab.Machine{Name: g.Machine, CPUs: j.cpus, Memory: j.memory, User: j.login}
	create := ledger.Create{Spec: ledger.SpecOf(role), Address: addr, Agent: img.Agent, User: img.User}
	img.Image.Digest = j.img.Box // so that the box stays while the machine is there
	if limit := j.img.limits[c.Count]; limit > img.Size {
		role.Disk = limit
	}
	o.tell(j, 0, fmt.Sprintf("booting a throw-away machine for step %d of %d", c.Count+1, len(j.steps)), 0)
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
	client, err := o.login(alive, g, create)
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
	name := bakeHost
	if !img.Agent {
		name = string(g.Machine)
	}
	m := &bake.Machine{
		Guest: client, Sudo: user(create) != "root", Hostname: name,
		Key: guest.AuthorizedKey(key.Signer.PublicKey()), Dir: o.dir,
	}
	if err := m.Settle(alive); err != nil {
		client.Close()
		return nil, nil, err
	}
	return m, func() { client.Close() }, nil
}

// login tells the guest who it is, or waits until it knows, and logs in.
func (o *oven) login(ctx context.Context, g lab.Generation, c ledger.Create) (*guest.Client, error) {
	target, err := o.s.target(g.Machine, c, "")
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

// sweep removes the throw-away machines of bakes that were killed. The lab's lock is
// held, so that nobody bakes in them any more.
func (s *session) sweep(ctx context.Context) error {
	all, err := s.provider.List(ctx, s.id)
	if err != nil {
		return fmt.Errorf("listing the machines of %s: %w", s.id, err)
	}
	var errs []error
	for _, m := range all {
		if lab.BakeName(m.Machine) && s.machine(m.Machine).Phase == "" {
			errs = append(errs, (&oven{s: s}).discard(ctx, m.Generation))
		}
	}
	return errors.Join(errs...)
}

// bakes starts to bake what the plan's new generations miss.
func (s *session) bakes(ctx context.Context, want *lab.Lab, p plan.Plan, images map[lab.Name]Image) (*oven, error) {
	o := s.newOven(want, images)
	if err := s.sweep(ctx); err != nil && !interrupted(ctx, err) {
		return nil, err
	}
	var machines []lab.Machine
	for _, step := range p.Steps {
		if m, ok := want.Machine(step.Machine); ok && (step.Action == plan.Create || step.Action == plan.Replace) {
			machines = append(machines, m)
		}
	}
	o.start(ctx, machines)
	return o, nil
}

// baked is image for a step of a plan, with an error that names the machine.
func (o *oven) baked(ctx context.Context, step plan.Step) (Image, error) {
	if step.Action != plan.Create && step.Action != plan.Replace {
		return o.images[step.Machine], nil
	}
	img, err := o.image(ctx, step.Machine)
	if err != nil && !interrupted(ctx, err) {
		err = &MachineError{Machine: step.Machine, Generation: step.Next, Stage: StageBake, Err: err}
	}
	return img, err
}

// BakedImage is what Bake did for one machine.
type BakedImage struct {
	Machine lab.Name    `json:"machine"`
	Image   string      `json:"image"` // digest of what the machine is to be born from
	Box     string      `json:"box"`   // digest
	Layers  []lab.Layer `json:"layers"`
	Baked   int         `json:"baked"` // how many of the layers were baked just now
	Size    lab.Bytes   `json:"size"`  // virtual size of the disk
}

// BakeOptions are the options of Bake.
type BakeOptions struct {
	UpOptions
	NoCache bool // bake every step, whether its layer is stored or not
}

// Bake bakes the images of the machines, or of all, and touches no machine. What is
// stored already is not baked again.
//
// Errors: *LockedError, *NoMachineError, *UpError with a *BakeError per image, and
// those of fetching boxes.
func (l *Lab) Bake(ctx context.Context, want *lab.Lab, opt BakeOptions) ([]BakedImage, error) {
	s, err := l.begin(ctx, want, opt.Options)
	if err != nil {
		return nil, err
	}
	defer s.end()
	names, err := expand(opt.Machines, want.Machines)
	if err != nil {
		return nil, err
	}
	_, images, err := s.plan(ctx, want, opt.UpOptions, nil)
	if err != nil {
		return nil, err
	}
	s.writeLock(want)
	var machines []lab.Machine
	for _, m := range want.Machines {
		if len(m.Provision) > 0 && (len(names) == 0 || slices.Contains(names, m.Name)) {
			machines = append(machines, m)
		}
	}
	o := s.newOven(want, images)
	o.all = opt.NoCache
	if slices.ContainsFunc(machines, func(m lab.Machine) bool { return o.all || images[m.Name].Missing > 0 }) {
		if err := s.open(want); err != nil {
			return nil, err
		}
		if err := s.sweep(ctx); err != nil {
			return nil, err
		}
	}
	o.start(ctx, machines)
	o.wg.Wait()
	baked, err := o.results(ctx, machines)
	sure, cancel := cleanup(ctx)
	defer cancel()
	return baked, errors.Join(err, s.closeIfEmpty(sure))
}

// results collects what became of the machines' images.
func (o *oven) results(ctx context.Context, machines []lab.Machine) ([]BakedImage, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var (
		list   []BakedImage
		failed UpError
	)
	for _, m := range machines {
		img, err := o.image(ctx, m.Name)
		if err != nil {
			failed.Failed = append(failed.Failed, &MachineError{Machine: m.Name, Stage: StageBake, Err: err})
			continue
		}
		b := BakedImage{Machine: m.Name, Image: img.Digest, Box: img.Box, Layers: img.Layers, Size: img.Size}
		for _, l := range img.Layers {
			if o.fresh[l.Key] {
				b.Baked++
			}
		}
		list = append(list, b)
	}
	if len(failed.Failed) > 0 {
		return list, &failed
	}
	return list, nil
}

// stored returns the image of a generation that was recorded.
func (h *Host) stored(img Image, layers []lab.Layer) (Image, error) {
	if len(layers) == 0 {
		return img, nil
	}
	img.Layers, img.Digest = layers, layers[len(layers)-1].Key
	img = img.on(h.layers().Chain(img.Box, layers, nil))
	if img.Missing > 0 {
		return img, fmt.Errorf("the layer of %q is not stored any more; \"lab up\" bakes what the Labfile says", layers[len(layers)-img.Missing].Text)
	}
	return img, nil
}

// PruneLayers removes the layers that no recorded generation of any lab, no machine,
// and no image in keep is made of. With dryRun it only says which.
func (h *Host) PruneLayers(ctx context.Context, keep []string, dryRun bool) ([]bake.Removed, error) {
	used, err := h.BoxesInUse(ctx)
	if err != nil {
		return nil, err
	}
	needed := map[string]bool{}
	for _, key := range slices.Concat(used, keep) {
		needed[key] = true
	}
	ids, err := h.ids(ctx)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		records, err := h.Lab(id).book.Read()
		var damaged *ledger.CorruptError
		if err != nil && !errors.As(err, &damaged) {
			return nil, err
		}
		for _, r := range records {
			if r.Type != ledger.MachineCreate {
				continue
			}
			c, err := ledger.CreateOf(r)
			if err != nil {
				return nil, err
			}
			for _, l := range c.Layers {
				needed[l.Key] = true
			}
		}
	}
	return h.layers().Prune(func(key string) bool { return needed[key] }, dryRun)
}

// Images returns the digests of what the machines of a Labfile are to be born from,
// and of every layer below.
func (l *Lab) Images(ctx context.Context, want *lab.Lab, o UpOptions) ([]string, error) {
	s := &session{Lab: l, opt: o.Options}
	if err := s.look(ctx, want); err != nil {
		return nil, err
	}
	_, images, err := s.plan(ctx, want, o, nil)
	if err != nil {
		return nil, err
	}
	var keys []string
	for _, img := range images {
		for _, layer := range img.Layers {
			keys = append(keys, layer.Key)
		}
	}
	return keys, nil
}
