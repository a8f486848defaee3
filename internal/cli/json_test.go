// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/ui"
)

// Every key of the JSON output is documented.
func TestJSONIsDocumented(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "json.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []any{
		statusJSON{},
		listJSON{},
		ui.PlanJSON{},
		ui.VerifyJSON{},
		engine.Drift{},
		historyJSON{},
		burnJSON{},
		volumesJSON{},
		validateJSON{},
		doctorJSON{},
		lockJSON{},
		gcJSON{},
		sshHostJSON{},
		boxJSON{},
		Version{},
	} {
		for _, key := range keys(reflect.TypeOf(v)) {
			if !strings.Contains(string(doc), "`"+key+"`") {
				t.Errorf("docs/json.md does not name %q of %T", key, v)
			}
		}
	}
}

// keys returns the JSON keys of a type and of those in it.
func keys(t reflect.Type) []string {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice:
		return keys(t.Elem())
	case reflect.Struct:
	default:
		return nil
	}
	switch t {
	case reflect.TypeFor[time.Time](), reflect.TypeFor[ledger.Spec](): // a spec is the ledger's own
		return nil
	}
	var all []string
	for i := range t.NumField() {
		f := t.Field(i)
		if !f.IsExported() {
			continue
		}
		if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" && name != "-" {
			all = append(all, name)
		}
		all = append(all, keys(f.Type)...)
	}
	return all
}
