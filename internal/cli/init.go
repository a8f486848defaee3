// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/labfile"
)

func (a *app) initCommand() *command {
	return &command{
		name: "init", group: groupDaily, args: "[FOLDER]", max: 1,
		short: "write a Labfile to start from",
		long: `Writes a commented Labfile into the folder, which is made if need be. A
Labfile that is there already is left alone.`,
		flags: []cli.Flag{&cli.StringFlag{Name: "name", Usage: "call the lab `NAME` (default: the folder's name)"}},
		examples: []string{
			"lab init", "in the current folder",
			"lab init --name shop demo", "in the folder demo, for a lab called shop",
		},
		run: func(_ context.Context, r request) error {
			dir, err := a.Dir()
			if err != nil {
				return err
			}
			if len(r.args) == 1 {
				if filepath.IsAbs(r.args[0]) {
					dir = r.args[0]
				} else {
					dir = filepath.Join(dir, r.args[0])
				}
			}
			name := r.String("name")
			if name == "" {
				name = labelFrom(filepath.Base(dir))
			}
			if !lab.ValidLabel(name) {
				return usage("lower-case letters, digits and dashes, such as \"shop\"", "%q cannot be the name of a lab", name)
			}
			return a.writeStarter(dir, name)
		},
	}
}

// labelFrom makes the name of a lab from that of a folder.
func labelFrom(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			return r
		case r >= 'A' && r <= 'Z':
			return r - 'A' + 'a'
		}
		return '-'
	}, s)
	s = strings.Trim(s[:min(len(s), 30)], "-")
	if s == "" {
		return "lab"
	}
	return s
}

func (a *app) writeStarter(dir, name string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("making the folder: %w", err)
	}
	path := filepath.Join(dir, "Labfile")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return &hinted{fmt.Errorf("%s is there already", path), "\"lab validate\" checks it; \"lab up\" uses it"}
	}
	if err != nil {
		return fmt.Errorf("writing the Labfile: %w", err)
	}
	_, err = f.Write(labfile.Starter(name))
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("writing the Labfile: %w", err)
	}
	a.ui.Note("wrote %s; \"lab up\" boots what it says", path)
	return nil
}
