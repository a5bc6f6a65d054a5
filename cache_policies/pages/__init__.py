"""How tokens lie in pages: fields, layouts, codecs, and the plan of a request's pages."""
