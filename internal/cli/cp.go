// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
)

// place is a path here or on a machine.
type place struct {
	machine lab.Name // empty: here
	path    string
}

// placeOf reads "web:/srv" as a path on a machine. "./web:a" is one here, as is
// everything with a slash before the colon.
func placeOf(arg string) place {
	name, path, ok := strings.Cut(arg, ":")
	if !ok || !isMachine(name) {
		return place{path: arg}
	}
	if path == "" {
		path = "."
	}
	return place{machine: lab.Name(name), path: path}
}

func (a *app) cpCommand() *command {
	return &command{
		name: "cp", group: groupDaily, args: "SOURCE... TARGET", min: 2, max: -1, lab: true,
		short: "copy files to or from a machine",
		long: `A path on a machine is written MACHINE:PATH; a relative one begins in the home of
the user. Folders are copied whole, with modes, times, holes and symbolic links; a file
with several names (hard links) becomes several files. If the target is a folder, or
ends in a slash, sources go into it. A source that ends
in "." means the contents of a folder. A path on the machine may be a pattern, in
quotes. "-" is standard input or output. A device, a pipe or an open file that is
the target, or that a link leads to, is written to. A copy from a machine into a
folder stays in it: a link there that leads out of the folder is not followed.`,
		flags: []cli.Flag{
			userFlag(),
			&cli.BoolFlag{Name: "recursive", Aliases: []string{"r"}, Usage: "copy folders whole, which is what it does anyway"},
		},
		complete: a.completeCopy,
		examples: []string{
			"lab cp site/ web:/srv/www", "a folder to a machine",
			"lab cp db:/var/log/syslog .", "a file from one",
			"lab cp 'db:/var/log/*.log' logs/", "all that match",
			"lab cp site/. web:/srv/www", "what is in a folder",
			"pg_dump shop | lab cp - db:/tmp/shop.sql", "from standard input",
		},
		run: func(ctx context.Context, r request) error {
			last := len(r.args) - 1
			target := placeOf(r.args[last])
			var sources []string
			var from lab.Name
			for i, arg := range r.args[:last] {
				p := placeOf(arg)
				if i > 0 && p.machine != from {
					return usage("copy in several steps", "the sources must be in one place")
				}
				from = p.machine
				sources = append(sources, p.path)
			}
			const how = "write MACHINE:PATH for one of the sides, such as \"lab cp a web:/tmp\""
			switch {
			case from != "" && target.machine != "":
				return usage("copy to a folder here first", "lab cp does not copy between machines")
			case from == "" && target.machine == "":
				return usage(how, "neither side of the copy is on a machine")
			}
			machine := from + target.machine
			client, err := a.connect(ctx, string(machine), r.String("user"), "cp", r.args)
			if err != nil {
				return err
			}
			defer client.Close()
			show := a.show()
			defer show.close()
			opt := guest.CopyOptions{Stdin: a.In, Stdout: a.Out}
			if a.ui.Size != nil { // a log is no place for every file's name
				opt.Progress = func(path string, done, total int64) {
					show.event(engine.Event{
						Time: time.Now(), Machine: machine, Stage: "copy", Text: fmt.Sprintf("copying %s", path), Done: done, Total: total,
					})
				}
			}
			if from != "" {
				return client.Download(ctx, sources, target.path, opt)
			}
			return client.Upload(ctx, sources, target.path, opt)
		},
	}
}
