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

        HashSet<string> seen = new(manifest.Tensors.Count);
        long end = 0;
        string? before = null;
        foreach (ManifestTensor tensor in manifest.Tensors)
        {
            if (!seen.Add(tensor.Name)) problems.Add(new(Field(tensor.Name), "named twice"));
            int found = problems.Found;
            CheckTensor(tensor, plan, format, problems);
            if (problems.Found > found) continue; // its length is not known
            if (tensor.Offset < end)
            {
                problems.Add(new(Field(tensor.Name), before is null
                    ? $"offset {tensor.Offset} is negative"
                    : $"offset {tensor.Offset} lies inside or before tensor '{before}', which ends at {end}"));
                continue;
            }

            if (tensor.Offset > manifest.PayloadBytes - tensor.Bytes)
                problems.Add(new(Field(tensor.Name), $"ends past the payload of {manifest.PayloadBytes} bytes"));
            end = Math.Max(end, tensor.Offset) + tensor.Bytes;
            before = tensor.Name;
        }

        foreach (LoadEntry entry in plan.Entries)
        {
            if (entry.Tied && seen.Contains(entry.Source) && !seen.Contains(entry.TiedTo))
                problems.Add(new(Field(entry.Source), $"is tied to '{entry.TiedTo}': send that too, or only that"));
            if (!manifest.Partial && !entry.Tied && !seen.Contains(entry.Source)) problems.Add(new(Field(entry.Source), "missing"));
        }

        // Gaps are for alignment; a payload that is mostly gaps is a mistake that would cost memory.
        long most = end + (manifest.Tensors.Count + 1L) * 4096;
        if (problems.Count == 0 && manifest.PayloadBytes > most)
            problems.Add(new(nameof(manifest.PayloadBytes), $"{manifest.PayloadBytes}, but the tensors end at {end}"));
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

        if (tensor.SparseCount is not { } count) return;
        if (format == WeightFormat.Int8 && entry.RowElements > 1)
            problems.Add(new(Field(tensor.Name), "is stored as int8, where elements share a scale with their row: send it whole"));
        if (entry.Elements > uint.MaxValue)
            problems.Add(new(Field(tensor.Name), "has more elements than a sparse index can name: send it whole"));
        if (count < 0 || count > entry.Elements)
            problems.Add(new(Field(tensor.Name), $"{count} of its {entry.Elements} elements cannot be sent"));
        if (entry.Tied) problems.Add(new(Field(tensor.Name), $"is tied to '{entry.TiedTo}': send it whole or not at all"));
    }

    private static string Field(string tensor) => $"{nameof(UpdateManifest.Tensors)}['{tensor}']";
}
