// SPDX-License-Identifier: Apache-2.0

package local

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// TrashOf returns what interrupted Destroys left of the generation in dir.
func TrashOf(dir string) []string {
	entries, err := os.ReadDir(filepath.Dir(dir))
	if err != nil {
		return nil
	}
	var found []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), TrashPrefix+"-"+filepath.Base(dir)+"-") {
			found = append(found, filepath.Join(filepath.Dir(dir), e.Name()))
		}
	}
	return found
}

// List inspects all generations that have directories, of one lab or of every
// lab if id is empty. machines is where a lab's directories are, labs where the
// labs are.
func List(ctx context.Context, labs string, machines func(lab.ID) string, id lab.ID, inspect func(lab.Generation) (providers.Machine, bool, error)) ([]providers.Machine, error) {
	generations, err := Generations(labs, machines, id)
	if err != nil {
		return nil, err
	}
	var found []providers.Machine
	for _, g := range generations {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		m, ok, err := inspect(g)
		if err != nil {
			return nil, err
		}
		if ok {
			found = append(found, m)
		}
	}
	return found, nil
}

// Generations lists the generations that have directories, those included that are
// on their way out, sorted by lab, machine and number.
func Generations(labs string, machines func(lab.ID) string, id lab.ID) ([]lab.Generation, error) {
	ids := []string{string(id)}
	if id == "" {
		var err error
		if ids, err = Names(labs); err != nil {
			return nil, err
		}
	} else if !lab.ValidLabel(string(id)) {
		return nil, fmt.Errorf("%q is not the id of a lab", id)
	}
	var found []lab.Generation
	for _, l := range ids {
		if !lab.ValidLabel(l) || len(l) > lab.MaxID {
			continue // not a lab's directory
		}
		of, err := generationsOf(lab.ID(l), machines(lab.ID(l)))
		if err != nil {
			return nil, err
		}
		found = append(found, of...)
	}
	slices.SortFunc(found, Compare)
	return found, nil
}

// Compare orders generations by lab, machine and number.
func Compare(a, b lab.Generation) int {
	return cmp.Or(cmp.Compare(a.Lab, b.Lab), cmp.Compare(a.Machine, b.Machine), cmp.Compare(a.Number, b.Number))
}

func generationsOf(id lab.ID, root string) ([]lab.Generation, error) {
	machines, err := Names(root)
	if err != nil {
		return nil, err
	}
	var found []lab.Generation
	for _, name := range machines {
		if !lab.ValidLabel(name) {
			continue
		}
		entries, err := Names(filepath.Join(root, name))
		if err != nil {
			return nil, err
		}
		numbers := map[int]bool{}
		for _, e := range entries {
			// A directory on its way out counts as its generation.
			if rest, ok := strings.CutPrefix(e, TrashPrefix+"-"); ok {
				e, _, _ = strings.Cut(rest, "-")
			}
			if n, err := strconv.Atoi(e); err == nil && n > 0 && strconv.Itoa(n) == e {
				numbers[n] = true
			}
		}
		for n := range numbers {
			found = append(found, lab.Generation{Lab: id, Machine: lab.Name(name), Number: n})
		}
	}
	return found, nil
}

// Names returns the entries of a directory; an absent one has none.
func Names(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		if Gone(err) {
			return nil, nil
		}
		return nil, err
	}
	var found []string
	for _, e := range entries {
		if e.IsDir() {
			found = append(found, e.Name())
		}
	}
	return found, nil
}
