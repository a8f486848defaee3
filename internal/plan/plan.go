// SPDX-License-Identifier: Apache-2.0

// Package plan compares what is wanted with what was recorded and what is
// observed, and says per machine what to do and why. It is pure: the plan that
// is shown is the plan that is carried out.
package plan

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"

	"github.com/labfile/lab/internal/lab"
)

// Action is what is to be done about a machine.
type Action string

// The actions.
const (
	Keep    Action = "keep"    // it runs as wanted
	Start   Action = "start"   // it exists and is stopped
	Create  Action = "create"  // there is none
	Replace Action = "replace" // a new generation takes its place
	Destroy Action = "destroy" // it is not wanted
)

// Plan is what to do about a lab. Steps stand in dependency order, those that
// destroy last.
type Plan struct {
	Lab     lab.ID   `json:"lab"`
	Changed []string `json:"changed,omitempty"` // what is applied in place to the lab as a whole
	Steps   []Step   `json:"steps"`
}

// Step is what to do about one machine.
type Step struct {
	Machine    lab.Name   `json:"machine"`
	Action     Action     `json:"action"`
	Reasons    []string   `json:"reasons,omitempty"`    // why, in the user's words
	Changes    []string   `json:"changes,omitempty"`    // what is applied in place
	Generation int        `json:"generation,omitempty"` // the present one; 0 if there is none
	Next       int        `json:"next,omitempty"`       // the one to make; 0 if none
	Leftovers  []int      `json:"leftovers,omitempty"`  // generations to remove besides
	Retire     []int      `json:"retire,omitempty"`     // generations that gave way and are to be stopped and kept
	Pruned     []int      `json:"pruned,omitempty"`     // those of Leftovers that are beyond the number to be kept
	Kept       int        `json:"kept,omitempty"`       // that number
	Bake       []string   `json:"bake,omitempty"`       // provision steps to bake before the generation is made
	DependsOn  []lab.Name `json:"dependsOn,omitempty"`
	Undone     string     `json:"undone,omitempty"` // what an interrupted command left, which is undone first, in words

	Strategy    lab.Strategy `json:"strategy,omitempty"`    // of a replacement: how it is gone about
	StrategyWhy string       `json:"strategyWhy,omitempty"` // why that is not what the Labfile says
}

// Changes reports whether carrying the plan out would change anything.
func (p Plan) Changes() bool {
	return len(p.Changed) > 0 || slices.ContainsFunc(p.Steps, func(s Step) bool {
		return s.Action != Keep || s.InPlace()
	})
}

// InPlace reports whether something is to be done beside the action.
func (s Step) InPlace() bool { return len(s.Changes) > 0 || len(s.Leftovers) > 0 || len(s.Retire) > 0 }

// Count returns how many steps have the action.
func (p Plan) Count(a Action) int {
	n := 0
	for _, s := range p.Steps {
		if s.Action == a {
			n++
		}
	}
	return n
}

// Phase is how far a recorded generation has come.
type Phase string

// The phases that a plan tells apart.
const (
	PhaseUnfinished Phase = "unfinished" // intended, and not heard of again
	PhaseFailed     Phase = "failed"     // never became ready
	PhaseLived      Phase = "lived"      // became ready at least once
	PhaseDestroying Phase = "destroying"
	PhaseGone       Phase = "gone"
)

// Recorded is what the ledger says of a machine's newest generation.
type Recorded struct {
	Spec       lab.Machine
	Generation int
	Last       int         // the highest number that a generation ever had
	Image      string      // digest of what it was born from
	Box        string      // digest of the box; empty in records older than provision steps
	Layers     []lab.Layer // baked on top of the box
	Phase      Phase
	Trouble    string // why it failed, or how it ended by itself; empty if neither
	Stopped    bool   // it was stopped on purpose
	Stopping   bool   // perhaps half: it may run still, but not for long
	Rollback   int    // the generation that it goes back to; 0 if it was not rolled back
	Retired    []int  // generations that gave way and are kept; those that do not exist any more do not matter
	Outgoing   []int  // generations that gave way, of which it was not recorded yet that they are kept
	Failed     []int  // generations that never took over and are kept until the next replacement

	Tainted []string // why it is known to be a snowflake; empty if it is not
	Expired string   // why it is too old; empty if it is not
}

// State is what was observed of a generation.
type State string

// The observed states.
const (
	Running State = "running"
	Stopped State = "stopped"
	Broken  State = "broken" // half made
)

// Observed is a generation that the provider has.
type Observed struct {
	Number      int
	State       State
	Unreachable string // why it cannot be reached though it runs; empty if it can
}

// Image is what a machine is to be born from: a box, with provision steps baked in.
type Image struct {
	Digest  string // the key of the last layer; the box's digest if there are none
	Box     string // digest
	Layers  []lab.Layer
	Missing int // how many of the layers, the last ones, are not baked yet
}

// Input is everything a plan is made from.
type Input struct {
	Lab      lab.ID
	Want     *lab.Lab
	Images   map[lab.Name]Image // what each machine is to be born from; a machine without one may keep what it has
	Opened   *lab.Lab           // the lab as a whole as it was recorded; nil for a new one. It has no machines
	Recorded map[lab.Name]Recorded
	Observed map[lab.Name][]Observed
	Only     []lab.Name // these and what they depend on; empty for all
	Rebuild  []lab.Name // replace these whatever their state
	Why      string     // of Rebuild; empty if the user just asked for it
}

// Make makes the plan. Machines named in Only or Rebuild must be wanted.
func Make(in Input) Plan {
	p := Plan{Lab: in.Lab, Changed: in.changed()}
	selected := closure(in.Want, in.Only)
	for _, m := range inOrder(in.Want) {
		if selected[m.Name] {
			s := in.step(m)
			if s.Pruned = in.Recorded[m.Name].pruned(s.Leftovers); len(s.Pruned) > 0 {
				s.Kept = m.Replace.Keep
			}
			p.Steps = append(p.Steps, s)
		}
	}
	if len(in.Only) == 0 {
		p.Steps = append(p.Steps, in.unwanted()...)
	}
	return p
}

func (in Input) step(m lab.Machine) Step {
	rec, recorded := in.Recorded[m.Name]
	s := Step{Machine: m.Name, DependsOn: m.DependsOn, Generation: rec.Generation}
	var (
		seen    Observed
		there   bool
		highest = max(rec.Generation, rec.Last)
	)
	for _, o := range in.Observed[m.Name] {
		highest = max(highest, o.Number)
		if o.State == Broken {
			rec.Outgoing = slices.DeleteFunc(slices.Clone(rec.Outgoing), func(n int) bool { return n == o.Number })
		}
		if recorded && o.Number == rec.Generation && rec.Phase != PhaseGone {
			seen, there = o, true
		} else {
			s.Leftovers = append(s.Leftovers, o.Number)
		}
	}
	others := s.Leftovers
	s.Leftovers, s.Retire = rec.leftovers(others, 0, m.Replace.Keep)
	renew := func(a Action, why ...string) Step {
		s.Action, s.Reasons, s.Next = a, why, highest+1
		s.Bake = in.Images[m.Name].bake()
		present := 0
		if there {
			others, present = append(others, rec.Generation), rec.Generation
		}
		if rec.Phase != PhaseLived || seen.State == Broken {
			present = 0 // nothing to keep
		}
		rec.Failed = nil
		s.Leftovers, s.Retire = rec.leftovers(others, present, m.Replace.Keep)
		if a == Replace {
			s.Strategy, s.StrategyWhy = strategy(m, present != 0 && seen.State == Running && !rec.Stopping, seen.Unreachable)
		}
		return s
	}
	switch {
	case !recorded && len(s.Leftovers) > 0:
		s.Generation = highest
		return renew(Replace, "it was found without a record")
	case !recorded:
		return renew(Create, "first creation")
	case rec.Phase == PhaseGone || rec.Phase == PhaseDestroying && !there:
		s.Generation = 0
		return renew(Create, "it was destroyed")
	case rec.Phase == PhaseDestroying:
		return renew(Replace, fmt.Sprintf("generation %d is half destroyed", rec.Generation))
	case !there:
		s.Generation = 0
		return renew(Create, fmt.Sprintf("generation %d has vanished", rec.Generation))
	}

	var why []string
	if slices.Contains(in.Rebuild, m.Name) {
		why = append(why, cmp.Or(in.Why, "you asked to replace it"))
	}
	switch rec.Phase {
	case PhaseUnfinished:
		why = append(why, fmt.Sprintf("generation %d was interrupted before it was ready", rec.Generation))
	case PhaseFailed:
		why = append(why, because(fmt.Sprintf("generation %d never became ready", rec.Generation), rec.Trouble))
	}
	if seen.State == Broken {
		why = append(why, fmt.Sprintf("generation %d is half made", rec.Generation))
	}
	changed := differences(rec, m, in.Images[m.Name])
	if rec.Rollback > 0 && len(changed) > 0 {
		why = append(why, fmt.Sprintf("it was rolled back to generation %d, and the Labfile wants something else", rec.Rollback))
	}
	why = append(why, changed...)
	why = append(why, rec.policy()...)
	if len(why) > 0 {
		return renew(Replace, why...)
	}
	s.Action, s.Changes = Keep, inPlace(rec.Spec, m)
	if seen.State == Stopped || rec.Stopping || seen.Unreachable != "" {
		s.Action = Start
		switch {
		case seen.Unreachable != "":
			s.Reasons = []string{fmt.Sprintf("it cannot be reached: %s; it is shut down and started again", seen.Unreachable)}
		case seen.State != Stopped:
			s.Reasons = []string{"a command was interrupted that was about to stop it"}
		case rec.Stopped:
			s.Reasons = []string{"it is stopped"}
		default:
			s.Reasons = []string{because("it no longer runs", rec.Trouble)}
		}
	}
	return s
}

// differences says what of a machine can only be changed by replacing it.
func differences(rec Recorded, want lab.Machine, img Image) []string {
	have := rec.Spec
	var why []string
	field := func(name string, a, b any) {
		if a != b {
			why = append(why, fmt.Sprintf("%s changed: %v -> %v", name, a, b))
		}
	}
	switch {
	case have.Box != want.Box:
		field("box", have.Box, want.Box)
	case img.Digest != "" && rec.box() != img.Box:
		why = append(why, fmt.Sprintf("box %s is pinned to another digest: %s -> %s", want.Box, short(rec.box()), short(img.Box)))
	}
	if img.Digest != "" {
		why = append(why, provision(rec.Layers, img.Layers)...)
		if len(why) == 0 && rec.Image != img.Digest {
			why = append(why, fmt.Sprintf("image changed: %s -> %s", short(rec.Image), short(img.Digest)))
		}
	}
	field("cpus", have.CPUs, want.CPUs)
	field("memory", have.Memory, want.Memory)
	if have.Disk != want.Disk {
		why = append(why, fmt.Sprintf("disk changed: %s -> %s", orBox(have.Disk), orBox(want.Disk)))
	}
	if have.UserData != want.UserData {
		why = append(why, "user_data changed")
	}
	if have.Network != want.Network {
		why = append(why, fmt.Sprintf("network changed: %s -> %s", orSwitch(have.Network), orSwitch(want.Network)))
	}
	why = append(why, boot(have.Boot, want.Boot)...)
	why = append(why, storage(have, want)...)
	return why
}

func orSwitch(k lab.NetworkKind) string {
	if k == lab.NetworkSwitch {
		return "switch"
	}
	return string(k)
}

// inPlace says what changed that a running machine can take.
func inPlace(have, want lab.Machine) []string {
	var changes []string
	for _, f := range want.Ports {
		if !slices.Contains(have.Ports, f) {
			changes = append(changes, fmt.Sprintf("port %s added", f))
		}
	}
	for _, f := range have.Ports {
		if !slices.Contains(want.Ports, f) {
			changes = append(changes, fmt.Sprintf("port %s removed", f))
		}
	}
	if !slices.Equal(have.Ready, want.Ready) {
		changes = append(changes, "ready checks changed")
	}
	if !reflect.DeepEqual(have.Tests, want.Tests) {
		changes = append(changes, "checks changed")
	}
	if !sameTimeouts(have.Boot, want.Boot) {
		changes = append(changes, "timeouts of boot steps changed")
	}
	if have.User != want.User {
		changes = append(changes, "user changed")
	}
	return append(changes, policies(have, want)...)
}

// unwanted returns the steps for machines that are no longer in the Labfile.
func (in Input) unwanted() []Step {
	var steps []Step
	names := map[lab.Name]bool{}
	for name, rec := range in.Recorded {
		names[name] = rec.Phase != PhaseGone
	}
	for name, seen := range in.Observed {
		names[name] = names[name] || len(seen) > 0
	}
	for name, exists := range names {
		if _, wanted := in.Want.Machine(name); wanted || !exists {
			continue
		}
		s := Step{
			Machine: name, Action: Destroy, Generation: in.Recorded[name].Generation,
			Reasons: []string{"it is not in the Labfile"},
		}
		for _, o := range in.Observed[name] {
			s.Generation = max(s.Generation, o.Number)
			s.Leftovers = append(s.Leftovers, o.Number)
		}
		slices.Sort(s.Leftovers)
		steps = append(steps, s)
	}
	slices.SortFunc(steps, func(a, b Step) int {
		if a.Machine < b.Machine {
			return -1
		}
		return 1
	})
	return steps
}

// closure returns the machines named in only with all that they depend on, or
// all machines if only is empty.
func closure(want *lab.Lab, only []lab.Name) map[lab.Name]bool {
	selected := map[lab.Name]bool{}
	var add func(lab.Name)
	add = func(name lab.Name) {
		m, ok := want.Machine(name)
		if !ok || selected[name] {
			return
		}
		selected[name] = true
		for _, d := range m.DependsOn {
			add(d)
		}
	}
	for _, name := range only {
		add(name)
	}
	if len(only) == 0 {
		for _, m := range want.Machines {
			selected[m.Name] = true
		}
	}
	return selected
}

// inOrder returns the machines, each behind what it depends on, and otherwise
// in the order of the Labfile.
func inOrder(want *lab.Lab) []lab.Machine {
	var order []lab.Machine
	done := map[lab.Name]bool{}
	var visit func(lab.Machine)
	visit = func(m lab.Machine) {
		if done[m.Name] {
			return
		}
		done[m.Name] = true
		for _, d := range m.DependsOn {
			if dep, ok := want.Machine(d); ok {
				visit(dep)
			}
		}
		order = append(order, m)
	}
	for _, m := range want.Machines {
		visit(m)
	}
	return order
}

func orBox(b lab.Bytes) string {
	if b == 0 {
		return "the box's own"
	}
	return b.String()
}

func short(digest string) string { return digest[:min(len(digest), len("sha256:")+12)] }

func because(what, why string) string {
	if why == "" {
		return what
	}
	return what + ": " + why
}
