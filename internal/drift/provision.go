// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"gopkg.in/yaml.v3"
)

// ProvisionOptions say how Provision writes the steps.
type ProvisionOptions struct {
	Files string // folder of the host that takes what does not fit into a Labfile; "" for none
	From  string // how the Labfile names that folder
}

const (
	maxInline    = 64 << 10  // bytes of a file that is written into a step
	maxInlineAll = 512 << 10 // bytes of all of them: a Labfile has at most 1 MiB
	maxExtract   = 4 << 30   // bytes that are written to Files
	indent       = "      "  // of a step below machines, a machine and provision
)

// Provision returns steps for the Labfile that make what is on the disk old into
// what is on the disk now: text files as such, all else as commands. Comments name
// what can't be said, and files with secrets, which are withheld.
func Provision(ctx context.Context, old, now Side, changes []Change, o ProvisionOptions) (string, error) {
	p := &provision{ctx: ctx, now: now, o: o, changes: changes}
	for name, to := range map[string]*map[uint32]string{"/etc/passwd": &p.users, "/etc/group": &p.groups} {
		var err error
		if *to, err = old.accounts(ctx, name); err != nil {
			return "", fmt.Errorf("%s at birth: %w", name, err)
		}
	}
	if o.Files != "" {
		if err := os.MkdirAll(o.Files, 0o777); err != nil {
			return "", err
		}
		dir, err := os.OpenRoot(o.Files)
		if err != nil {
			return "", err
		}
		defer dir.Close()
		p.dir = dir
	}
	return p.steps()
}

type provision struct {
	ctx     context.Context
	now     Side
	o       ProvisionOptions
	changes []Change
	users   map[uint32]string // those that the image has at birth
	groups  map[uint32]string
	dir     *os.Root

	notes          []string
	before, after  []string // commands ahead of the files, and those that need them
	files          []*yaml.Node
	inline, copied int64 // bytes so far
}

func (p *provision) steps() (string, error) {
	gone := "\x00" // the folder that was deleted last
	packages := false
	for _, c := range p.changes {
		if !utf8.ValidString(c.Path) || strings.ContainsAny(c.Path, "\n\r") {
			p.note(c.Path, "has a name that no step can have")
			continue
		}
		packages = packages || strings.HasPrefix(c.Path, "/var/lib/dpkg/") || strings.HasPrefix(c.Path, "/lib/apk/db/")
		if c.Op == Deleted || c.Op == Replaced {
			if !strings.HasPrefix(c.Path, gone+"/") {
				p.before = append(p.before, "rm -rf -- "+quote(c.Path))
			}
			if c.Old.Kind == KindDir {
				gone = c.Path
			}
		}
		if c.Op == Deleted {
			continue
		}
		if err := p.change(c); err != nil {
			return "", fmt.Errorf("%s: %w", c.Path, err)
		}
	}
	if packages {
		p.notes = append(p.notes, "Packages were installed or removed: a step that does so with the package manager says it better.")
	}
	// A folder is made before what is in it, after what stood in its place is gone.
	slices.SortStableFunc(p.before, func(a, b string) int { return rank(a) - rank(b) })
	steps := []*yaml.Node{}
	if len(p.before) > 0 {
		steps = append(steps, shell(p.before))
	}
	steps = append(steps, p.files...)
	if len(p.after) > 0 {
		steps = append(steps, shell(p.after))
	}
	var b strings.Builder
	for _, note := range p.notes {
		fmt.Fprintf(&b, "%s# %s\n", indent, note)
	}
	for _, s := range steps {
		text, err := encode(s)
		if err != nil {
			return "", err
		}
		b.WriteString(text)
	}
	return b.String(), nil
}

func rank(command string) int {
	if strings.HasPrefix(command, "rm ") {
		return 0
	}
	return 1
}

func (p *provision) note(path, what string) {
	p.notes = append(p.notes, strconv.Quote(path)+" "+what)
}

// change adds what makes something that was added or modified.
func (p *provision) change(c Change) error {
	m, name := c.New, quote(c.Path)
	made := c.Op != Modified
	is := func(what string) bool { return made || slices.Contains(c.What, what) }
	switch m.Kind {
	case KindFile:
		if is(Content) {
			there, err := p.file(c)
			if there {
				p.attrs(c, true)
			}
			return err
		}
	case KindDir:
		if made {
			p.before = append(p.before, "mkdir -p -- "+name)
		}
	case KindSymlink:
		if is(Target) {
			if !utf8.ValidString(m.Target) || strings.ContainsAny(m.Target, "\n\r") {
				p.note(c.Path, "leads to a name that no step can have")
				return nil
			}
			p.after = append(p.after, fmt.Sprintf("ln -sfn -- %s %s", quote(m.Target), name))
		}
	default:
		if made || is(Device) {
			p.note(c.Path, fmt.Sprintf("is a %s, which no step makes", m.Kind))
			return nil
		}
	}
	defer p.attrs(c, made) // a new owner takes capabilities away, and a mode changes an access control list
	if made && m.UID == 0 && m.GID == 0 && (m.Kind == KindSymlink || m.Kind == KindDir && m.Mode == "0755") {
		return nil
	}
	// A new owner takes setuid away, so the mode comes last.
	owned := is(Owner) && !(made && m.UID == 0 && m.GID == 0)
	if owned {
		p.after = append(p.after, fmt.Sprintf("chown -h -- %s %s", p.owner(m), name))
	}
	if m.Kind != KindSymlink && (is(Mode) || owned && m.Mode[0] != '0') {
		p.after = append(p.after, fmt.Sprintf("chmod -- %s %s", m.Mode, name))
	}
	return nil
}

// attrs gives what was made anew, or modified, its extended attributes.
func (p *provision) attrs(c Change, anew bool) {
	var old map[string][]byte
	if !anew {
		old = c.Old.XAttrs
	}
	commands, notes := attrCommands(quote(c.Path), old, c.New.XAttrs, func(user bool, id uint32) string {
		names := p.groups
		if user {
			names = p.users
		}
		return cmp.Or(names[id], strconv.FormatUint(uint64(id), 10))
	})
	p.after = append(p.after, commands...)
	for _, note := range notes {
		p.note(c.Path, note)
	}
}

// file adds a step for a file with a content of its own, if there can be one.
func (p *provision) file(c Change) (bool, error) {
	m := c.New
	var head bytes.Buffer
	why, err := p.now.contents(p.ctx, &head, c.Path, m, maxText)
	if err != nil {
		return false, err
	}
	if why != "" {
		p.note(c.Path, why)
		return false, nil
	}
	text := head.Bytes()
	if secret(c.Path, text) {
		p.note(c.Path, "has secrets, which are withheld")
		return false, nil
	}
	body := &yaml.Node{Kind: yaml.MappingNode}
	set(body, "to", c.Path)
	switch {
	case m.Size > maxInline || len(text) > maxInline:
		why = "is large"
	case !plain(text):
		why = "is binary"
	case p.inline+m.Size > maxInlineAll:
		why = "is one too many for a Labfile"
	}
	switch {
	case why == "":
		p.inline += m.Size
		set(body, "content", string(text))
	case p.dir == nil:
		p.note(c.Path, fmt.Sprintf("(%d bytes) %s: --files DIR keeps it there and makes a step of it", m.Size, why))
		return false, nil
	case m.Size > maxExtract-p.copied:
		p.note(c.Path, fmt.Sprintf("(%d bytes) is left out: the files have more than %d bytes in all", m.Size, int64(maxExtract)))
		return false, nil
	default:
		p.copied += m.Size
		if err := p.extract(c.Path, m); err != nil {
			return false, err
		}
		set(body, "from", p.o.From+c.Path)
	}
	set(body, "mode", "0"+m.Mode[1:])
	set(body, "owner", p.owner(m))
	if m.Mode[0] != '0' {
		p.after = append(p.after, fmt.Sprintf("chmod -- %s %s", m.Mode, quote(c.Path)))
	}
	for _, other := range c.Links {
		if !utf8.ValidString(other) || strings.ContainsAny(other, "\n\r") {
			p.note(other, "has a name that no step can have")
			continue
		}
		p.after = append(p.after, fmt.Sprintf("ln -f -- %s %s", quote(c.Path), quote(other)))
	}
	step := &yaml.Node{Kind: yaml.MappingNode}
	step.Content = append(step.Content, scalar("file"), body)
	p.files = append(p.files, step)
	return true, nil
}

// extract copies a file to the folder. The name is the guest's: os.Root keeps it in.
func (p *provision) extract(name string, m *Meta) (err error) {
	rel := strings.TrimPrefix(path.Clean(name), "/")
	if err := p.dir.MkdirAll(path.Dir(rel), 0o777); err != nil {
		return err
	}
	w, err := p.dir.Create(filepath.FromSlash(rel))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	why, err := p.now.contents(p.ctx, w, name, m, m.Size)
	if err == nil && why != "" {
		err = errors.New(why)
	}
	return err
}

// owner names an owner as the image knows it, or by number.
func (p *provision) owner(m *Meta) string {
	user, group := p.users[m.UID], p.groups[m.GID]
	if user == "" {
		user = strconv.FormatUint(uint64(m.UID), 10)
	}
	if group == "" {
		group = strconv.FormatUint(uint64(m.GID), 10)
	}
	return user + ":" + group
}

func shell(commands []string) *yaml.Node {
	step := &yaml.Node{Kind: yaml.MappingNode}
	set(step, "shell", strings.Join(commands, "\n")+"\n")
	return step
}

func set(mapping *yaml.Node, key, value string) {
	mapping.Content = append(mapping.Content, scalar(key), scalar(literal(key, value)))
}

// scalar is a text, as a block if it has lines. What can't be shown on a terminal
// is quoted, so that it can be escaped.
func scalar(s string) *yaml.Node {
	n := &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: s}
	switch {
	case strings.ContainsFunc(s, func(r rune) bool { return r != '\n' && r != '\t' && !strconv.IsPrint(r) || r == utf8.RuneError }):
		n.Style = yaml.DoubleQuotedStyle
	case strings.Contains(s, "\n"):
		n.Style = yaml.LiteralStyle
	}
	return n
}

// literal escapes what a Labfile would take for a variable in the value of a key.
func literal(key, s string) string {
	if key == "content" || key == "shell" { // text for the guest
		return strings.ReplaceAll(s, "${{", "$${{")
	}
	var b strings.Builder
	for i := range len(s) {
		b.WriteByte(s[i])
		if s[i] == '$' && i+1 < len(s) && (s[i+1] == '{' || s[i+1] == '$') {
			b.WriteByte('$')
		}
	}
	return b.String()
}

// quote makes one word of the shell of a text.
func quote(s string) string {
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+:@%,", r))
	}) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// encode writes a step as an item of a list. A text that does not come back from a
// block as it was is quoted instead.
func encode(step *yaml.Node) (string, error) {
	text, err := item(step)
	if err != nil {
		return "", err
	}
	if same, err := comesBack(text, step); err == nil && same {
		return text, nil
	}
	quoteAll(step)
	if text, err = item(step); err != nil {
		return "", err
	}
	if same, err := comesBack(text, step); err != nil || !same {
		return "", fmt.Errorf("a step can't be written as YAML: %w", err)
	}
	return text, nil
}

func item(step *yaml.Node) (string, error) {
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	err := errors.Join(e.Encode(&yaml.Node{Kind: yaml.SequenceNode, Content: []*yaml.Node{step}}), e.Close())
	var out strings.Builder
	for line := range strings.Lines(b.String()) {
		if line != "\n" {
			out.WriteString(indent)
		}
		out.WriteString(line)
	}
	return out.String(), err
}

func comesBack(text string, step *yaml.Node) (bool, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal([]byte(text), &doc); err != nil {
		return false, err
	}
	return len(doc.Content) == 1 && len(doc.Content[0].Content) == 1 && equal(doc.Content[0].Content[0], step), nil
}

func equal(a, b *yaml.Node) bool {
	return a.Kind == b.Kind && a.Value == b.Value && slices.EqualFunc(a.Content, b.Content, equal)
}

func quoteAll(n *yaml.Node) {
	if n.Kind == yaml.ScalarNode && n.Style == yaml.LiteralStyle {
		n.Style = yaml.DoubleQuotedStyle
	}
	for _, c := range n.Content {
		quoteAll(c)
	}
}
