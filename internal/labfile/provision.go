// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"fmt"
	"strings"

	"github.com/labfile/lab/internal/lab"
)

// stepEntry is an item of provision. It has one kind.
type stepEntry struct {
	place
	shellKey
	File fileStep `yaml:"file" also:"copy upload files template" doc:"Puts a file or a folder of this host, or a text, into the image."`
}

func (*stepEntry) alternatives() []string { return []string{"shell", "file"} }

// shellKey is what steps of provision and of boot have in common.
type shellKey struct {
	Shell shellStep `yaml:"shell" also:"run exec script cmd command inline" doc:"Runs commands as root: a program for /bin/sh -e, or a script of this host."`
}

// shellStep is a program, or a script of the host. Written as a text it is one or
// the other, by what it looks like.
type shellStep struct {
	place
	Run    text          `yaml:"run" guest:"text" short:"yes" also:"inline cmd command" doc:"A program for /bin/sh -e."`
	Script text          `yaml:"script" also:"path file" doc:"A script of this host, relative to the Labfile's folder. It is copied into the guest and executed there, so its first line says by what."`
	Args   list[anyText] `yaml:"args" example:"--verbose" also:"arguments" doc:"Arguments of the script."`
}

func (*shellStep) alternatives() []string { return []string{"run", "script"} }

func (*shellStep) foreign(key string) string {
	if key == "timeout" {
		return "timeout stands beside shell, not within it, and only in boot"
	}
	return ""
}

type fileStep struct {
	place
	From    text    `yaml:"from" also:"source src path" doc:"A file or folder of this host, relative to the Labfile's folder. Of a folder, what is in it."`
	Content anyText `yaml:"content" guest:"text" also:"text inline" doc:"The content of the file itself, in place of from."`
	To      text    `yaml:"to" need:"/srv/web" form:"path" also:"destination dest target" doc:"Absolute path in the guest. With a / at its end, the folder to put from into."`
	Owner   text    `yaml:"owner" form:"owner" default:"root:root" also:"user" doc:"user:group, user, or numbers."`
	Mode    text    `yaml:"mode" form:"mode" default:"that of the file on this host; 0644 for content" also:"permissions" doc:"Permissions, octal. For a folder those of the files in it; what may read a file may enter its folder."`
}

func (*fileStep) alternatives() []string { return []string{"from", "content"} }

// provision returns the steps of a role.
func (c *converter) provision(r *role) []lab.Provision {
	var steps []lab.Provision
	for i := range r.row.value.Provision.items {
		e := &r.row.value.Provision.items[i]
		p := lab.Provision{Place: fmt.Sprintf("%s:%d:%d", c.file, e.line, e.column)}
		switch {
		case e.Shell.set() && e.File.set():
			c.add(e.place, "is two steps in one: shell and file; begin each with a dash of its own")
			continue
		case e.Shell.set():
			c.shell(&e.Shell, &p)
		case e.File.set():
			c.fileStep(&e.File, &p)
		default:
			continue // it could not be read, which has been reported
		}
		steps = append(steps, p)
	}
	return steps
}

func (c *converter) shell(e *shellStep, p *lab.Provision) {
	p.Kind = lab.ProvisionShell
	switch {
	case e.Run.set() && e.Script.set():
		c.add(e.Script.place, "a step has run or script, not both")
	case e.Run.set() && e.Run.path == e.path: // the short form
		p.Shell = e.Run.value
		if words := scriptWords(e.Run.value); words != nil {
			p.Shell, p.Script = "", words[0]
			c.hostFile(text{e.Run.place, words[0]}, scriptFile)
			p.Args = append(p.Args, words[1:]...)
		}
	case e.Run.set():
		p.Shell = e.Run.value
	case e.Script.set():
		p.Script = e.Script.value
		if c.hostPath(e.Script) {
			c.hostFile(e.Script, scriptFile)
		}
	case e.Args.set() && !c.noted(e.path):
		c.add(e.place, "args belong to a script; add %q", "script: ./install.sh")
	}
	for _, a := range e.Args.items {
		p.Args = append(p.Args, a.value)
	}
	if e.Args.set() && e.Run.set() {
		c.add(e.Args.place, "args belong to a script; a program in run has its words in place")
	}
}

// scriptWords returns the script and the arguments that a line names which is one
// plain command beginning with ./ or ../, or nil if it is a program for the shell.
func scriptWords(line string) []string {
	line = strings.TrimSpace(line)
	if !strings.HasPrefix(line, "./") && !strings.HasPrefix(line, "../") || strings.ContainsAny(line, "\n\r|&;<>()$`\\\"'*?[]#~%{}!") {
		return nil
	}
	return strings.Fields(line)
}

func (c *converter) fileStep(e *fileStep, p *lab.Provision) {
	p.Kind = lab.ProvisionFile
	p.To, p.Owner, p.Mode = e.To.value, e.Owner.value, e.Mode.value
	switch {
	case e.From.set() && e.Content.set():
		c.add(e.Content.place, "a file has from or content, not both")
	case e.From.set():
		p.From = e.From.value
		if c.hostPath(e.From) {
			c.hostFile(e.From, anyFile)
		}
	case e.Content.set():
		content := e.Content.value
		p.Content = &content
		if strings.HasSuffix(p.To, "/") {
			c.add(e.To.place, "%q is a folder; say how the file is to be called", shorten(p.To))
		}
	case e.To.set() && !c.noted(e.path):
		c.add(e.place, "says where to, but not what; add from or content")
	}
}
