// SPDX-License-Identifier: Apache-2.0

package recipes_test

import (
	"slices"
	"testing"

	"github.com/labfile/lab/boxes/recipes"
	"github.com/labfile/lab/internal/labfile"
)

// TestLabfileKnowsTheRecipes checks what package labfile says of built-in boxes by
// heart: it reads Labfiles without having any box.
func TestLabfileKnowsTheRecipes(t *testing.T) {
	var refs []string
	for _, name := range recipes.Names() {
		refs = append(refs, "builtin/"+name)
	}
	if got := labfile.Builtins(); !slices.Equal(got, refs) {
		t.Errorf("labfile knows %v, the recipes are %v", got, refs)
	}
	for _, ref := range refs {
		r, err := recipes.Get(ref)
		if err != nil {
			t.Fatal(err)
		}
		if got := labfile.MinMemory(ref); got != r.MinMemory {
			t.Errorf("%s: labfile asks for at least %v, the recipe for %v", ref, got, r.MinMemory)
		}
		if got := labfile.DefaultMemory(ref); got < r.MinMemory {
			t.Errorf("%s: labfile gives %v, the recipe asks for at least %v", ref, got, r.MinMemory)
		}
		plain := "lab: shop\nmachines:\n  web:\n    box: " + ref + "\n"
		if _, err := labfile.Parse("Labfile", []byte(plain), labfile.Options{}); err != nil {
			t.Errorf("%s: %v", ref, err)
		}
		// A Labfile may have user data just where something reads it.
		_, err = labfile.Parse("Labfile", []byte(plain+"    user_data: '#!/bin/true'\n"), labfile.Options{})
		if got := err == nil; got != r.CloudInit {
			t.Errorf("%s: labfile takes user data: %v (%v); the recipe has cloud-init: %v", ref, got, err, r.CloudInit)
		}
	}
}
