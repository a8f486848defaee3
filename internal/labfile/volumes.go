// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"fmt"
	"path"
	"path/filepath"
	"strings"

	"github.com/labfile/lab/internal/lab"
)

// volumeEntry is an item of volumes.
type volumeEntry struct {
	place
	Name     text    `yaml:"name" need:"data" form:"label" also:"volume" doc:"Name of the volume within the lab. The replica NAME-2 has a volume of its own, with -2 behind this name; a read-only one is shared."`
	Size     size    `yaml:"size" need:"1GiB" range:"1MiB..16TiB" also:"capacity" doc:"Size, in whole MiB. It can grow later, and never shrink."`
	FS       text    `yaml:"fs" oneof:"ext4 none" default:"ext4" also:"filesystem format type" doc:"File system to make on it once; none leaves it a bare disk."`
	Mount    text    `yaml:"mount" form:"path" also:"to path target mountpoint" doc:"Absolute path in the guest at which it is mounted. Not for fs: none."`
	Owner    text    `yaml:"owner" form:"owner" also:"user" doc:"Owner of the mounted folder: user:group, user, or numbers. Without it, that of the folder which the image has there; root:root if there is none."`
	Mode     text    `yaml:"mode" form:"mode" also:"permissions" doc:"Permissions of the mounted folder, octal. Without it, those of the folder which the image has there; 0755 if there is none."`
	ReadOnly boolean `yaml:"read_only" default:"false" also:"readonly ro" doc:"The machine only reads it. Several machines can have one volume, of which all but one only read."`
}

// mountEntry is an item of mounts.
type mountEntry struct {
	place
	From     text    `yaml:"from" need:"./src" short:"yes" also:"source src host hostpath" doc:"Folder of this host, relative to the Labfile's folder."`
	To       text    `yaml:"to" need:"/src" form:"path" also:"target guest destination dest mount" doc:"Absolute path in the guest."`
	Writable boolean `yaml:"writable" default:"false" also:"write rw" doc:"Lets the guest change the folder of this host."`
	Owner    text    `yaml:"owner" form:"owner" default:"the user whom one logs in as" also:"user" doc:"To whom everything in it belongs, as the guest sees it: user:group, user, or numbers. On this host it is yours."`
}

// volumes returns the volumes of a role, under the names of the Labfile.
func (c *converter) volumes(r *role) []lab.Volume {
	var out []lab.Volume
	names := map[string]bool{}
	for i := range r.row.value.Volumes.items {
		e := &r.row.value.Volumes.items[i]
		if !e.Name.set() {
			continue // it could not be read, which has been reported
		}
		if names[e.Name.value] {
			c.add(e.Name.place, "the volume stands here twice")
		}
		names[e.Name.value] = true
		v := lab.Volume{
			Name: e.Name.value, Size: e.Size.value, FS: "ext4",
			Mount: e.Mount.value, Owner: e.Owner.value, Mode: e.Mode.value, ReadOnly: e.ReadOnly.value,
		}
		if e.FS.set() {
			v.FS = e.FS.value
		}
		switch {
		case v.FS == "none":
			for _, t := range []text{e.Mount, e.Owner, e.Mode} {
				if t.set() {
					c.add(t.place, "a bare disk has no file system to mount; leave this out, or write fs: ext4")
				}
			}
		case !e.Mount.set():
			c.add(e.place, "mount is missing; add %q, or %q for a bare disk", "mount: /srv/data", "fs: none")
		}
		out = append(out, v)
	}
	return out
}

// volumeOf returns the volume as the machine called name has it. Each replica has
// its own, unless it only reads: then somebody else's is meant.
func (c *converter) volumeOf(r *role, v lab.Volume, name lab.Name) lab.Volume {
	if r.replicated() && !v.ReadOnly {
		v.Name += strings.TrimPrefix(string(name), r.name())
	}
	return v
}

// sharedVolumes notes what does not fit between machines that have a volume in
// common.
func (c *converter) sharedVolumes(machines []lab.Machine) {
	type use struct {
		machine lab.Name
		volume  lab.Volume
	}
	uses := map[string]use{}
	said := map[place]bool{}
	add := func(at place, format string, args ...any) {
		if !said[at] {
			said[at] = true
			c.add(at, format, args...)
		}
	}
	for _, m := range machines {
		r := c.names[m.Name]
		for _, v := range m.Volumes {
			if !lab.ValidLabel(v.Name) {
				add(c.volumePlace(r, v), "the name %q of a replica's volume is longer than 63 characters", v.Name)
				continue
			}
			before, shared := uses[v.Name]
			if !shared || before.volume.ReadOnly {
				uses[v.Name] = use{m.Name, v}
			}
			if !shared || before.machine == m.Name {
				continue
			}
			at := c.volumePlace(r, v)
			switch {
			case !v.ReadOnly && !before.volume.ReadOnly:
				add(at, "%s writes to the volume %s too; one machine can, the others need %q", before.machine, v.Name, "read_only: true")
			case v.Size != before.volume.Size:
				add(at, "the volume %s has %s for %s already; it has one size", v.Name, before.volume.Size, before.machine)
			case v.FS != before.volume.FS:
				add(at, "the volume %s is made with fs: %s for %s already", v.Name, before.volume.FS, before.machine)
			}
		}
	}
}

// volumePlace returns where the volume stands that became v for a machine of r.
func (c *converter) volumePlace(r *role, v lab.Volume) place {
	for _, e := range r.row.value.Volumes.items {
		if v.Name == e.Name.value || !v.ReadOnly && strings.HasPrefix(v.Name, e.Name.value+"-") && v.Mount == e.Mount.value {
			return e.Name.place
		}
	}
	return r.row.key
}

// mounts returns the folders of the host that a role sees. Their From is as
// written.
func (c *converter) mounts(r *role) []lab.Mount {
	var out []lab.Mount
	for i := range r.row.value.Mounts.items {
		e := &r.row.value.Mounts.items[i]
		if !e.From.set() {
			continue // it could not be read, which has been reported
		}
		m := lab.Mount{From: e.From.value, To: e.To.value, Writable: e.Writable.value, Owner: e.Owner.value}
		if e.From.path == e.path { // the short form
			colon := strings.LastIndexByte(m.From, ':')
			if colon < 1 {
				c.add(e.From.place, "%q is not a mount; write \"HOST:GUEST\", such as \"./src:/src\"", shorten(m.From))
				continue
			}
			m.From, m.To = m.From[:colon], m.From[colon+1:]
			if m.To == "ro" || m.To == "rw" {
				c.add(e.From.place, "a mount is read-only unless it is written as {from: …, to: …, writable: true}; leave out :%s", m.To)
				continue
			}
			if err := guestPath(m.To); err != nil {
				c.add(e.From.place, "%v", err)
				continue
			}
		}
		from := e.From
		from.value = m.From
		if c.hostPath(from) {
			c.hostFile(from, mountFolder)
		}
		m.To = path.Clean(m.To)
		out = append(out, m)
	}
	return out
}

// mountPoints notes places of the guest that nothing can be mounted at, or that two
// things would be mounted at.
func (c *converter) mountPoints(r *role) {
	taken := map[string]int{}
	check := func(at place, point string) {
		if point == "" {
			return
		}
		point = path.Clean(point)
		if line, ok := taken[point]; ok {
			c.add(at, "something is mounted at %s already (line %d)", shorten(point), line)
		}
		taken[point] = at.line
		top, _, below := strings.Cut(strings.TrimPrefix(point, "/"), "/")
		switch top {
		case "":
			c.add(at, "/ is the machine's own disk")
		case "proc", "sys", "dev":
			c.add(at, "nothing can be mounted in /%s", top)
		case "bin", "boot", "etc", "lib", "lib32", "lib64", "run", "sbin", "usr":
			if !below {
				c.add(at, "mounted at %s it would hide the system's own files", point)
			}
		}
	}
	for _, e := range r.row.value.Volumes.items {
		check(e.Mount.place, e.Mount.value)
	}
	folder := func(at place, point string) {
		check(at, point)
		// Volumes are mounted before folders.
		for _, v := range r.row.value.Volumes.items {
			if below := path.Clean(v.Mount.value); strings.HasPrefix(below, path.Clean(point)+"/") {
				c.add(at, "mounted at %s it would hide the volume at %s (line %d); mount it somewhere else, or below the volume", shorten(point), shorten(below), v.Mount.line)
				break
			}
		}
	}
	for _, e := range r.row.value.Mounts.items {
		switch {
		case e.To.set():
			folder(e.To.place, e.To.value)
		case e.From.set():
			if i := strings.LastIndexByte(e.From.value, ':'); i > 0 && guestPath(e.From.value[i+1:]) == nil {
				folder(e.From.place, e.From.value[i+1:])
			}
		}
	}
}

// guestPath says what is wrong with a path of the guest.
func guestPath(s string) error {
	switch {
	case !strings.HasPrefix(s, "/"):
		return fmt.Errorf("%q is not an absolute path of the guest; it begins with /", shorten(s))
	case strings.Contains(s+"/", "/../"):
		return fmt.Errorf("%q has a .. in it; write the path without", shorten(s))
	case strings.ContainsAny(s, "\n\r"):
		return fmt.Errorf("%q is not a path", shorten(s))
	}
	return nil
}

// locate says which file the lab is from, and makes the paths of mounts absolute,
// which are relative to its folder.
func locate(l *lab.Lab, file string) {
	l.File = file
	for i := range l.Machines {
		for j := range l.Machines[i].Mounts {
			m := &l.Machines[i].Mounts[j]
			if !filepath.IsAbs(m.From) {
				m.From = filepath.Join(filepath.Dir(file), m.From)
			}
			m.From = filepath.Clean(m.From)
		}
	}
}
