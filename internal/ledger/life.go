// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"time"

	"github.com/labfile/lab/internal/lab"
)

// Life is the part of a spec that says what a machine is baked from, what outlives
// it, and how and when it ends. What is at its default is left out, so that a ledger
// from before there was such a thing reads the same.
type Life struct {
	Provision []Provision `json:"provision,omitempty"`
	Boot      []BootStep  `json:"boot,omitempty"`
	Volumes   []Volume    `json:"volumes,omitempty"`
	Mounts    []Mount     `json:"mounts,omitempty"`
	Replace   *Replace    `json:"replace,omitempty"` // nil: lab.DefaultReplace
	OnShell   lab.Shell   `json:"onShell,omitempty"` // empty: lab.ShellAllow
	MaxAge    *Expiry     `json:"maxAge,omitempty"`
	Idle      *Expiry     `json:"idle,omitempty"`
}

// Provision is a lab.Provision as the ledger writes it: without its place, which
// changes with every line above it.
type Provision struct {
	Kind  lab.ProvisionKind `json:"kind"`
	Place string            `json:"-"`

	Shell  string   `json:"shell,omitempty"`
	Script string   `json:"script,omitempty"`
	Args   []string `json:"args,omitempty"`

	From    string  `json:"from,omitempty"`
	Content *string `json:"content,omitempty"`
	To      string  `json:"to,omitempty"`
	Owner   string  `json:"owner,omitempty"`
	Mode    string  `json:"mode,omitempty"`
}

// BootStep is a lab.BootStep as the ledger writes it.
type BootStep struct {
	Provision
	Timeout time.Duration `json:"timeout"`        // nanoseconds
	Step    string        `json:"step"`           // digest of the step without its script
	File    string        `json:"file,omitempty"` // digest of the script's content
}

// Volume is a lab.Volume as the ledger writes it.
type Volume struct {
	Name     string    `json:"name"`
	Size     lab.Bytes `json:"size"`
	FS       string    `json:"fs"`
	Mount    string    `json:"mount,omitempty"`
	Owner    string    `json:"owner,omitempty"`
	Mode     string    `json:"mode,omitempty"`
	ReadOnly bool      `json:"readOnly,omitempty"`
}

// Mount is a lab.Mount as the ledger writes it.
type Mount struct {
	From     string `json:"from"`
	To       string `json:"to"`
	Writable bool   `json:"writable,omitempty"`
	Owner    string `json:"owner,omitempty"`
}

// Replace is a lab.Replace as the ledger writes it.
type Replace struct {
	Strategy       lab.Strategy  `json:"strategy"`
	MaxUnavailable int           `json:"maxUnavailable"`
	Drain          time.Duration `json:"drain"` // nanoseconds
	OnFailure      lab.OnFailure `json:"onFailure"`
	Keep           int           `json:"keep"`
}

// Expiry is a lab.Expiry as the ledger writes it.
type Expiry struct {
	After time.Duration    `json:"after"` // nanoseconds
	Then  lab.ExpiryAction `json:"then"`
}

func lifeOf(m lab.Machine) Life {
	l := Life{OnShell: m.OnShell, MaxAge: expiryOf(m.MaxAge), Idle: expiryOf(m.Idle)}
	for _, p := range m.Provision {
		p.Place = ""
		l.Provision = append(l.Provision, Provision(p))
	}
	for _, b := range m.Boot {
		b.Place = ""
		l.Boot = append(l.Boot, BootStep{Provision(b.Provision), b.Timeout, b.Step, b.File})
	}
	for _, v := range m.Volumes {
		l.Volumes = append(l.Volumes, Volume(v))
	}
	for _, f := range m.Mounts {
		l.Mounts = append(l.Mounts, Mount(f))
	}
	if m.Replace != lab.DefaultReplace && m.Replace != (lab.Replace{}) {
		r := Replace(m.Replace)
		l.Replace = &r
	}
	if l.OnShell == lab.ShellAllow {
		l.OnShell = ""
	}
	return l
}

// fill sets what the record says of m.
func (l Life) fill(m *lab.Machine) {
	for _, p := range l.Provision {
		m.Provision = append(m.Provision, lab.Provision(p))
	}
	for _, b := range l.Boot {
		m.Boot = append(m.Boot, lab.BootStep{Provision: lab.Provision(b.Provision), Timeout: b.Timeout, Step: b.Step, File: b.File})
	}
	for _, v := range l.Volumes {
		m.Volumes = append(m.Volumes, lab.Volume(v))
	}
	for _, f := range l.Mounts {
		m.Mounts = append(m.Mounts, lab.Mount(f))
	}
	m.Replace, m.OnShell = lab.DefaultReplace, lab.ShellAllow
	if l.Replace != nil {
		m.Replace = lab.Replace(*l.Replace)
	}
	if l.OnShell != "" {
		m.OnShell = l.OnShell
	}
	m.MaxAge, m.Idle = l.MaxAge.expiry(), l.Idle.expiry()
}

func expiryOf(e lab.Expiry) *Expiry {
	if e.After == 0 {
		return nil
	}
	r := Expiry(e)
	return &r
}

func (e *Expiry) expiry() lab.Expiry {
	if e == nil {
		return lab.Expiry{}
	}
	return lab.Expiry(*e)
}
