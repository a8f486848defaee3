// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
)

func (a *app) adoptCommand() *command {
	return &command{
		name: "adopt", group: groupKeep, args: "LAB", min: 1, max: 1, lab: true,
		short: "make a lab that of this Labfile",
		long: `A lab belongs to the folder of its Labfile and moves with it: "mv" is noticed by
the next command. A copy, a clone, or a folder that came from another disk gets a lab of
its own. If that is not what you want, this takes over the lab that was there before,
with its machines, their disks and its volumes. Nothing about it is written to the folder.`,
		complete: a.completeLabs,
		examples: []string{
			"lab list", "the labs there are, and their Labfiles",
			"lab adopt shop-1f3a9c2b", "this folder's Labfile is that lab's from now on",
			"lab adopt shop-1f3a9c2b --name two", "likewise, as a second instance called two",
		},
		run: a.adopt,
	}
}

func (a *app) adopt(ctx context.Context, r request) error {
	if a.set.string("lab") != "" {
		return usage("write the lab's ID as the argument: lab adopt LAB", "--lab says nothing about which Labfile is meant")
	}
	h, err := a.host()
	if err != nil {
		return err
	}
	path, err := a.labfilePath()
	if err != nil {
		return err
	}
	want, err := a.load(path)
	if err != nil {
		return err
	}
	l, err := a.byID(ctx, h, r.args[0])
	if err != nil {
		return err
	}
	taken, err := l.TakeOver(want.Name, want.File, a.typed)
	if err != nil {
		return err
	}
	switch taken.From {
	case want.File:
		a.ui.Note("lab %s is that of this Labfile already", l.ID())
	case "":
		a.ui.Note("lab %s is that of %s from now on", l.ID(), want.File)
	default:
		a.ui.Note("lab %s is that of %s from now on; it was made from %s", l.ID(), want.File, taken.From)
	}
	return nil
}
