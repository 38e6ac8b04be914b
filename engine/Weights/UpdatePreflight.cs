using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>Compares an update's manifest with the model before a byte is sent, and lists every difference.</summary>
internal static class UpdatePreflight
{
    /// <param name="manifest">Describes what the sender is going to send.</param>
    /// <param name="plan">The tensors of the model.</param>
    /// <param name="servedVersion">Of the weights in service.</param>
    /// <param name="format">How the device stores matrices.</param>
    /// <param name="poison">Why the weights in service cannot be trusted, or null.</param>
    public static ProblemList Check(
        UpdateManifest manifest, LoadPlan plan, WeightFormat format, ulong servedVersion, string? poison)
    {
        ProblemList problems = [];
        if (manifest.BaseVersion != servedVersion)
            problems.Add(new(nameof(manifest.BaseVersion), $"is {manifest.BaseVersion}, but version {servedVersion} is being served"));
        if (manifest.NewVersion <= servedVersion)
            problems.Add(new(nameof(manifest.NewVersion), $"must be greater than {servedVersion}, served now; is {manifest.NewVersion}"));
        if (poison is not null && !manifest.IsFull)
            problems.Add(new(nameof(manifest.Tensors), $"only a full update, every tensor whole, can follow: {poison}"));

        Dictionary<string, List<ManifestTensor>> named = new(manifest.Tensors.Count);
        HashSet<string> wrong = [];
        int parts = 1 + manifest.JoinedPayloadBytes.Count;
        long[] ends = new long[parts];
        string?[] before = new string?[parts];
        foreach (ManifestTensor tensor in manifest.Tensors)
        {
            if (!named.TryGetValue(tensor.Name, out List<ManifestTensor>? slices)) named.Add(tensor.Name, slices = []);
            slices.Add(tensor);
            int found = problems.Found;
            CheckTensor(tensor, plan, format, problems);
            if (tensor.Part < 0 || tensor.Part >= parts)
                problems.Add(new(Field(tensor.Name), $"is in part {tensor.Part} of {parts}: the first is part 0"));
            if (problems.Found > found)
            {
                wrong.Add(tensor.Name);
                continue; // its length is not known
            }

            ref long end = ref ends[tensor.Part];
            if (tensor.Offset < end)
            {
                problems.Add(new(Field(tensor.Name), before[tensor.Part] is not { } last
                    ? $"offset {tensor.Offset} is negative"
                    : $"offset {tensor.Offset} lies inside or before tensor '{last}', which ends at {end}"));
                continue;
            }

            if (tensor.Offset > manifest.PayloadBytesOf(tensor.Part) - tensor.Bytes)
                problems.Add(new(Field(tensor.Name), $"ends past the payload of {manifest.PayloadBytesOf(tensor.Part)} bytes"));
            end = Math.Max(end, tensor.Offset) + tensor.Bytes;
            before[tensor.Part] = tensor.Name;
        }

        foreach ((string name, List<ManifestTensor> slices) in named)
        {
            if (slices.Count > 1 && slices.Exists(slice => slice.Rows is null)) problems.Add(new(Field(name), "named twice"));
            else if (!wrong.Contains(name)) CheckSlices(name, slices, problems);
        }

        foreach (LoadEntry entry in plan.Entries)
        {
            bool isNamed = named.TryGetValue(entry.Source, out List<ManifestTensor>? slices);
            if (!manifest.Partial && !entry.Tied && !isNamed) problems.Add(new(Field(entry.Source), "missing"));
            if (!entry.Tied || !isNamed) continue;
            if (!named.TryGetValue(entry.TiedTo, out List<ManifestTensor>? originals))
                problems.Add(new(Field(entry.Source), $"is tied to '{entry.TiedTo}': send that too, or only that"));
            else if (!Cuts(slices!).SequenceEqual(Cuts(originals))) // their bytes are compared slice by slice
                problems.Add(new(Field(entry.Source), $"is tied to '{entry.TiedTo}': send both in the same slices, or only that"));
        }

        // Gaps are for alignment; a payload that is mostly gaps is a mistake that would cost memory.
        long gaps = (manifest.Tensors.Count + 1L) * 4096;
        for (int part = 0; part < parts && problems.Count == 0; part++)
        {
            long bytes = manifest.PayloadBytesOf(part);
            string field = part == 0 ? nameof(manifest.PayloadBytes) : $"{nameof(manifest.JoinedPayloadBytes)}[{part - 1}]";
            if (bytes > ends[part] + gaps) problems.Add(new(field, $"{bytes}, but the tensors end at {ends[part]}"));
        }

        return problems;
    }

    private static void CheckTensor(ManifestTensor tensor, LoadPlan plan, WeightFormat format, ProblemList problems)
    {
        if (tensor.Type is not (DType.BFloat16 or DType.Float16 or DType.Float32))
            problems.Add(new(Field(tensor.Name), "dtype must be BF16, F16 or F32"));
        if (!plan.TryFind(tensor.Name, out LoadEntry? entry))
        {
            problems.Add(new(Field(tensor.Name), "the model has no such tensor"));
            return;
        }

        if (!entry.HasShape(tensor.Shape))
        {
            string found = LoadEntry.Format(tensor.Shape);
            problems.Add(new(Field(tensor.Name), $"shape is {found}, the model's is {LoadEntry.Format(entry.Shape)}"));
            return;
        }

        if (tensor.Rows is not { } rows)
        {
            if (tensor.FirstRow != 0) problems.Add(new(Field(tensor.Name), $"first row {tensor.FirstRow}, and no number of rows"));
        }
        else if (tensor.SparseCount is not null)
        {
            problems.Add(new(Field(tensor.Name), "a slice cannot be sparse"));
        }
        else if (rows < 1 || tensor.FirstRow < 0 || tensor.FirstRow > entry.Shape[0] - rows)
        {
            problems.Add(new(Field(tensor.Name), $"{rows} rows from row {tensor.FirstRow} on cannot be sent: it has {entry.Shape[0]}"));
        }

        if (tensor.SparseCount is not { } count) return;
        if (format == WeightFormat.Int8 && entry.RowElements > 1)
            problems.Add(new(Field(tensor.Name), "is stored as int8, where elements share a scale with their row: send it whole"));
        if (entry.Elements > uint.MaxValue)
            problems.Add(new(Field(tensor.Name), "has more elements than a sparse index can name: send it whole"));
        if (count < 0 || count > entry.Elements)
            problems.Add(new(Field(tensor.Name), $"{count} of its {entry.Elements} elements cannot be sent"));
        if (entry.Tied) problems.Add(new(Field(tensor.Name), $"is tied to '{entry.TiedTo}': send it whole or not at all"));
    }

    /// <summary>The slices of a tensor have one type and are all of it, each row once.</summary>
    private static void CheckSlices(string name, List<ManifestTensor> slices, ProblemList problems)
    {
        if (slices.Exists(slice => slice.Type != slices[0].Type))
        {
            IEnumerable<DType> types = slices.Select(slice => slice.Type).Distinct();
            problems.Add(new(Field(name), $"its slices differ in dtype: {string.Join(", ", types)}"));
        }

        long next = 0;
        foreach (ManifestTensor slice in slices.OrderBy(slice => slice.FirstRow))
        {
            long end = slice.FirstRow + (slice.Rows ?? slice.Shape[0]);
            if (slice.FirstRow > next) problems.Add(new(Field(name), $"rows {next} to {slice.FirstRow - 1} are in no slice"));
            if (slice.FirstRow < next)
                problems.Add(new(Field(name), $"rows {slice.FirstRow} to {Math.Min(next, end) - 1} are in two slices"));
            next = Math.Max(next, end);
        }

        if (next < slices[0].Shape[0]) problems.Add(new(Field(name), $"rows {next} to {slices[0].Shape[0] - 1} are in no slice"));
    }

    private static IEnumerable<(long FirstRow, long Rows)> Cuts(List<ManifestTensor> slices)
        => slices.Select(slice => (slice.FirstRow, slice.Rows ?? slice.Shape[0])).Order();

    private static string Field(string tensor) => $"{nameof(UpdateManifest.Tensors)}['{tensor}']";
}
