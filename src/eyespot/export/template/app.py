from eyespot.export.space import show

show(".")
