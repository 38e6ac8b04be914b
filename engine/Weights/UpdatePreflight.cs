using System.Globalization;

namespace Rollout.Engine;

/// <summary>Compares an update's manifest with the model before a byte moves, and lists every difference.</summary>
internal static class UpdatePreflight
{
    public static IReadOnlyList<Problem> Check(UpdateManifest manifest, LoadPlan plan, ulong servedVersion)
    {
        List<Problem> problems = [];
        if (manifest.BaseVersion != servedVersion)
            problems.Add(new("base_version", $"is {manifest.BaseVersion}, but version {servedVersion} is being served"));
        if (manifest.NewVersion <= servedVersion)
            problems.Add(new("new_version", $"must be greater than the version being served, {servedVersion}; is {manifest.NewVersion}"));

        HashSet<string> seen = [];
        long end = 0;
        string? before = null;
        foreach (ManifestTensor tensor in manifest.Tensors)
        {
            string field = $"manifest['{tensor.Name}']";
            if (!seen.Add(tensor.Name)) problems.Add(new(field, "named twice"));
            if (!plan.TryFind(tensor.Name, out LoadEntry? entry))
            {
                problems.Add(new(field, "the model has no such tensor"));
                continue;
            }

            if (!entry.Shape.SequenceEqual(tensor.Shape))
            {
                problems.Add(new(field, $"shape is {Format(tensor.Shape)}, the model's is {Format(entry.Shape)}"));
                continue;
            }

            if (tensor.Offset < end)
            {
                problems.Add(new(field, before is null
                    ? $"offset {tensor.Offset} is negative"
                    : $"offset {tensor.Offset} lies inside or before tensor '{before}', which ends at {end}"));
                continue;
            }

            if (tensor.Offset > manifest.PayloadBytes - tensor.Bytes)
                problems.Add(new(field, $"ends past the payload of {manifest.PayloadBytes} bytes"));
            end = Math.Max(end, tensor.Offset) + tensor.Bytes;
            before = tensor.Name;
        }

        foreach (LoadEntry entry in plan.Entries)
        {
            if (!entry.Tied && !seen.Contains(entry.Source)) problems.Add(new($"manifest['{entry.Source}']", "missing"));
        }

        // Gaps serve alignment; a payload that is mostly gap is a mistake that would be paid for in memory.
        long most = end + (manifest.Tensors.Count + 1L) * 4096;
        if (problems.Count == 0 && manifest.PayloadBytes > most)
            problems.Add(new("payload_bytes", $"{manifest.PayloadBytes}, but the tensors end at {end}"));
        return problems;
    }

    private static string Format(IReadOnlyList<long> shape)
        => $"[{string.Join(", ", shape.Select(dimension => dimension.ToString(CultureInfo.InvariantCulture)))}]";
}
