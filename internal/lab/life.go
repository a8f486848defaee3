// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"crypto/sha256"
	"fmt"
	"strings"
	"time"
)

// ProvisionKind says what a provision step does.
type ProvisionKind string

// The kinds of provision steps.
const (
	ProvisionShell ProvisionKind = "shell" // runs a command line or a script as root
	ProvisionFile  ProvisionKind = "file"  // puts a file or a folder into the image
)

// Provision is one step of making a machine's image from its box. It runs once, in
// a throw-away machine. Only the fields of its Kind are set, besides Place.
type Provision struct {
	Kind  ProvisionKind
	Place string // where it stands, for messages: "Labfile:12:7"

	Shell  string   // shell: an inline program for /bin/sh; empty if there is a script
	Script string   // shell: a file of the host, relative to the Labfile's folder
	Args   []string // shell: arguments of the script

	From    string  // file: a file or folder of the host, relative to the Labfile's folder; empty if there is Content
	Content *string // file: the content itself; nil if there is From
	To      string  // file: absolute path in the guest; with a "/" at its end the folder to put From into
	Owner   string  // file: "user:group", "user", or numbers; empty means root:root
	Mode    string  // file: octal, such as "0644"; empty keeps the host's
}

// String describes the step in a few words ("shell ./install.sh", "file web/ -> /srv/web").
func (p Provision) String() string {
	switch {
	case p.Kind == ProvisionFile && p.Content != nil:
		return "file " + p.To
	case p.Kind == ProvisionFile:
		return "file " + p.From + " -> " + p.To
	case p.Script != "":
		return "shell " + p.Script
	}
	line := p.Shell
	for i, c := range line {
		if c == '\n' || i >= 60 {
			line = line[:i] + " …"
			break
		}
	}
	return "shell " + line
}

// BootStep is a step that each generation of a machine runs once, as root, at its first
// boot. It is of the kind ProvisionShell.
type BootStep struct {
	Provision
	Timeout time.Duration // how long it may take

	// What it is known by again. Both are empty until the script was looked at.
	Step string // digest of the step without its script: "sha256:<hex>"
	File string // digest of the script's content; empty if it has none
}

// BootDigest returns the digest of what a machine runs at its first boot, scripts and
// arguments included: "sha256:<hex>". How long that may take is no part of it.
func BootDigest(steps []BootStep) string {
	h := sha256.New()
	for _, b := range steps {
		fmt.Fprintf(h, "%d:%s,%d:%s,", len(b.Step), b.Step, len(b.File), b.File)
	}
	return fmt.Sprintf("sha256:%x", h.Sum(nil))
}

// Layer is a provision step together with what it is made of: what its image is
// cached by.
type Layer struct {
	Key   string            `json:"key"`             // digest of the parent, the step and its files: "sha256:<hex>"
	Step  string            `json:"step"`            // digest of the step alone, without its files
	Text  string            `json:"text"`            // Provision.String
	Files map[string]string `json:"files,omitempty"` // digest of each file of the host that it uses (content and mode), by path
}

// Volume is data that outlives the generations of a machine.
type Volume struct {
	Name     string // within the lab
	Size     Bytes
	FS       string // "ext4", or "none" for a bare disk
	Mount    string // absolute path in the guest; empty if FS is "none"
	Owner    string // of the file system's root: "user:group", "user", or numbers; empty means root:root
	Mode     string // of the file system's root, octal; empty means 0755
	ReadOnly bool
}

// Mount shows a folder of the host to a machine.
type Mount struct {
	From     string // absolute path on the host
	To       string // absolute path in the guest
	Writable bool
	Owner    string // to whom it all belongs in the guest: "user:group", "user", or numbers; empty means the user whom one logs in as
}

// Strategy says how a generation gives way to the next one.
type Strategy string

// The strategies.
const (
	StopFirst Strategy = "stop-first" // the old one is shut down, then the next one boots
	BlueGreen Strategy = "blue-green" // the next one boots beside the old one and takes over when it is ready
	Rolling   Strategy = "rolling"    // replicas one after the other, each as by blue-green where it can be
)

// OnFailure says what becomes of a generation that never became ready.
type OnFailure string

// What becomes of it.
const (
	KeepFailed    OnFailure = "keep"    // stopped, with its disk and logs, until the next replacement
	DiscardFailed OnFailure = "discard" // destroyed
)

// Replace says how a machine's generations are replaced.
type Replace struct {
	Strategy       Strategy
	MaxUnavailable int           // rolling: how many replicas of a role are replaced at a time; at least 1
	Drain          time.Duration // how long connections to the old generation may go on
	OnFailure      OnFailure
	Keep           int // how many retired generations keep their disks
}

// DefaultReplace is how machines are replaced of which the Labfile says nothing.
var DefaultReplace = Replace{Strategy: StopFirst, MaxUnavailable: 1, Drain: 10 * time.Second, OnFailure: KeepFailed, Keep: 2}

// Shell says what a login or a command by hand does to a machine.
type Shell string

// The policies.
const (
	ShellAllow  Shell = "allow"  // it is recorded, no more
	ShellWarn   Shell = "warn"   // it is recorded, and the user is told
	ShellTaint  Shell = "taint"  // the generation is tainted: the next "lab up" replaces it
	ShellForbid Shell = "forbid" // it is refused
)

// ExpiryAction is what happens to a machine whose time is over.
type ExpiryAction string

// The actions.
const (
	ExpiryReplace ExpiryAction = "replace"
	ExpiryStop    ExpiryAction = "stop"
	ExpiryDestroy ExpiryAction = "destroy"
)

// Expiry is an age, and what happens then. Zero means never.
type Expiry struct {
	After time.Duration
	Then  ExpiryAction
}

// String renders the expiry in the user's words.
func (e Expiry) String() string {
	if e.After == 0 {
		return "never"
	}
	return fmt.Sprintf("%s after %s", e.Then, e.After)
}

// BakePrefix begins the names of the throw-away machines that images are baked in:
// six hexadecimal digits follow.
const BakePrefix = "bake-"

// BakeName reports whether name is that of a throw-away machine. No machine of a
// Labfile can be called so.
func BakeName(name Name) bool {
	digits, ok := strings.CutPrefix(string(name), BakePrefix)
	return ok && len(digits) == 6 && strings.Trim(digits, "0123456789abcdef") == ""
}
