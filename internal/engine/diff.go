// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/labfile/lab/internal/drift"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/providers"
)

// Subject names a disk: that of a machine's generation, 0 for the present one.
type Subject struct {
	Machine    lab.Name
	Generation int
}

// DiffOptions say what Diff compares.
type DiffOptions struct {
	Old     *Subject // nil compares New with its own birth
	New     Subject
	Content bool // tell the differences of text files too

	AsProvision *drift.ProvisionOptions // say it as provision steps too; nil for no
	drift.Options

	// Events is told of a guest that is asked and does not answer; may be nil.
	Events func(Event)
}

// Drift is what Diff found. Its JSON is the schema of "lab diff --json".
type Drift struct {
	Old string `json:"old"` // "web@3", or "web@3 at birth"
	New string `json:"new"`
	drift.Report
	Texts []string `json:"texts,omitempty"` // unified diffs, with DiffOptions.Content

	Provision  string   `json:"provision,omitempty"`  // steps for a Labfile, with DiffOptions.AsProvision
	Asked      []string `json:"asked,omitempty"`      // what a guest said of itself and was believed: "web@3 at birth", "web@3"
	Unreadable string   `json:"unreadable,omitempty"` // why it was asked

	Written int64 `json:"written"` // bytes of disk that New's generation has written since birth, at most
}

// Diff compares the disks of two generations, or one with its birth, from outside
// of the guests. It takes no lock. A machine that runs is asked to write what it
// holds, and goes on.
func (l *Lab) Diff(ctx context.Context, o DiffOptions) (d Drift, err error) {
	wanted := []Subject{o.New}
	if o.Old != nil {
		wanted = append(wanted, *o.Old)
	}
	disks, err := l.openDisks(ctx, wanted, o.Events)
	defer func() {
		for _, disk := range disks {
			err = errors.Join(err, disk.close(ctx))
		}
	}()
	if err != nil {
		return Drift{}, err
	}
	now := disks[0]
	old, layers := now, now.disk.Birth
	d.New, d.Old = now.g.String(), now.g.String()+" at birth"
	if len(disks) == 2 {
		old = disks[1]
		layers, d.Old = len(old.disk.Layers), old.g.String()
	} else if layers == 0 {
		return Drift{}, fmt.Errorf("%s was never ready, so its birth was not kept and there is nothing to compare with", now.g)
	}
	if now.disk.Birth > 0 && now.chain != nil {
		if d.Written, err = now.chain.Written(now.disk.Birth); err != nil {
			return Drift{}, fmt.Errorf("reading the disk of %s: %w", now.g, err)
		}
	}
	a, aerr := old.root(layers)
	b, berr := now.root(len(now.disk.Layers))
	if aerr != nil || berr != nil {
		return l.diffListed(ctx, o, d, &listedSide{disk: old, birth: len(disks) == 1, root: a, err: aerr}, &listedSide{disk: now, root: b, err: berr})
	}
	if d.Report, err = drift.Compare(ctx, a, b, o.Options); err != nil {
		return Drift{}, fmt.Errorf("comparing %s with %s: %w", d.Old, d.New, err)
	}
	return d, d.tell(ctx, a, b, o)
}

// tell says the changes as texts and as provision steps, as far as that was asked for.
func (d *Drift) tell(ctx context.Context, old, now drift.Side, o DiffOptions) (err error) {
	if o.AsProvision != nil {
		if d.Provision, err = drift.Provision(ctx, old, now, d.Changes, *o.AsProvision); err != nil {
			return fmt.Errorf("writing the drift of %s as provision steps: %w", d.New, err)
		}
	}
	for _, c := range d.Changes {
		if !o.Content {
			break
		}
		text, err := drift.Diff(ctx, old, now, c)
		if err != nil {
			return err
		}
		if text != "" {
			d.Texts = append(d.Texts, text)
		}
	}
	return nil
}

// openDisk is a disk of a generation, held still.
type openDisk struct {
	g     lab.Generation
	disk  providers.Disk
	chain *drift.Chain
	err   error // why there is no chain
}

// openDisks opens the disks of one or two subjects, and returns those that it opened
// even with an error. Two commands with the same disks take them in the same order.
func (l *Lab) openDisks(ctx context.Context, all []Subject, events func(Event)) ([]*openDisk, error) {
	for i, s := range all {
		m, _, err := l.known(s.Machine)
		if err != nil {
			return nil, err
		}
		if s.Generation == 0 {
			all[i].Generation = m.Generation
		}
	}
	order := []int{0}
	if len(all) == 2 {
		switch c := cmp.Or(cmp.Compare(all[0].Machine, all[1].Machine), cmp.Compare(all[0].Generation, all[1].Generation)); {
		case c == 0:
			return nil, fmt.Errorf("generation %d of machine %q was named twice: name one disk, or two", all[0].Generation, all[0].Machine)
		case c < 0:
			order = []int{0, 1}
		default:
			order = []int{1, 0}
		}
	}
	var opened []*openDisk
	for _, i := range order {
		d, err := l.openDisk(ctx, all[i], events)
		if err != nil {
			return opened, err
		}
		opened = append(opened, d)
	}
	if order[0] == 1 {
		slices.Reverse(opened)
	}
	return opened, nil
}

// openDisk opens the disk of a subject whose generation is set. Events is told of a guest
// that does not answer; may be nil.
func (l *Lab) openDisk(ctx context.Context, s Subject, events func(Event)) (*openDisk, error) {
	m, p, err := l.known(s.Machine)
	if err != nil {
		return nil, err
	}
	g := lab.Generation{Lab: l.id, Machine: s.Machine, Number: s.Generation}
	reader, ok := p.(providers.DiskReader)
	if !ok {
		return nil, fmt.Errorf("the disk of %s can't be read: the provider %s does not show it", g, p.Name())
	}
	cutOff := cutOff(ctx, p, g)
	if g.Number == m.Generation && m.Phase == ledger.PhaseReady && cutOff == nil {
		(&session{Lab: l, provider: p, opt: Options{Events: events}}).syncAttended(ctx, m)
	}
	d := &openDisk{g: g}
	if d.disk, err = reader.OpenDisk(ctx, g); err != nil {
		switch {
		case errors.Is(err, providers.ErrNotFound):
			return nil, l.noDisk(ctx, p, g, err)
		case cutOff != nil && ctx.Err() == nil: // how that shows says nothing
			return nil, cutOff
		}
		return nil, fmt.Errorf("opening the disk of %s: %w", g, err)
	}
	var layers []drift.Layer
	for _, y := range d.disk.Layers {
		layers = append(layers, drift.Layer{Path: y.Path, Format: y.Format})
	}
	d.chain, d.err = drift.OpenChain(layers)
	return d, nil
}

// noDisk says which generations of the machine still have a disk.
func (l *Lab) noDisk(ctx context.Context, p providers.Provider, g lab.Generation, cause error) error {
	all, err := p.List(ctx, l.id)
	if err != nil {
		return cause
	}
	var there []int
	for _, m := range all {
		if m.Machine == g.Machine && m.State != providers.StateBroken {
			there = append(there, m.Number)
		}
	}
	if len(there) == 0 {
		return fmt.Errorf("no generation of %s has a disk", g.Machine)
	}
	slices.Sort(there)
	return &NoGenerationError{Machine: g.Machine, Number: g.Number, Known: there, disk: true}
}

func (d *openDisk) root(layers int) (*drift.Root, error) {
	if d.err != nil {
		return nil, fmt.Errorf("opening the disk of %s: %w", d.g, d.err)
	}
	v, err := d.chain.View(layers)
	if err == nil {
		var r *drift.Root
		if r, err = drift.OpenRoot(v); err == nil {
			return r, nil
		}
	}
	return nil, fmt.Errorf("reading the disk of %s: %w", d.g, err)
}

func (d *openDisk) close(ctx context.Context) error {
	var errs []error
	if d.chain != nil {
		errs = append(errs, d.chain.Close())
	}
	ctx, cancel := cleanup(ctx)
	defer cancel()
	if d.disk.Release != nil {
		if err := d.disk.Release(ctx); err != nil {
			errs = append(errs, fmt.Errorf("letting go of the disk of %s: %w", d.g, err))
		}
	}
	return errors.Join(errs...)
}
