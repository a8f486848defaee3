// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/labfile/lab/internal/bake"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/plan"
)

// StageBake is a provision step that is run in a throw-away machine. It ends with an
// event that has taken time.
const StageBake Stage = "bake"

// StepError says that a step of provision or of boot failed. The layers of provision steps
// before it are kept.
type StepError struct {
	Key      string // of the Labfile: "provision" or "boot"
	Place    string // in the Labfile
	Step, Of int    // the step's number, from 1, and how many there are
	Text     string // the step
	Code     int    // exit code; 0 if it did not end by itself
	Signal   string // that ended it, without SIG
	Output   []string
	Err      error
}

// Error implements error. The output is not part of it.
func (e *StepError) Error() string {
	text := fmt.Sprintf("%s step %d of %d (%s): %v", e.Key, e.Step, e.Of, e.Text, e.Err)
	if e.Place != "" {
		return e.Place + ": " + text
	}
	return text
}

// Unwrap returns the cause.
func (e *StepError) Unwrap() error { return e.Err }

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
	network  lab.NetworkKind // that throw-away machines are in besides the switch
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
		if m.Network == lab.NetworkNAT { // the others have the same way out as at the switch, and meet nobody
			j.network = m.Network
		}
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
			o.tell(j, fmt.Sprintf("step %d of %d is being baked by somebody else", c.Count+1, len(j.steps)), 0)
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
func (o *oven) tell(j *job, text string, took time.Duration) {
	o.s.emit(Event{Machine: j.machines[0], Stage: StageBake, Text: text, Took: took})
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
// Errors: *LockedError, *NoMachineError, *UpError with a *StepError per image, and
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
	want, _, images, err := s.plan(ctx, want, opt.UpOptions, nil)
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
		s.machines, s.baking = want.Machines, want
		before := s.state.Opened.Expose
		if err := s.open(want); err != nil {
			return nil, err
		}
		proxies, err := s.proxies()
		if err != nil {
			return nil, err
		}
		s.relays = proxies.Relays
		if err := s.expose(ctx, before); err != nil {
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
