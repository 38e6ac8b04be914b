using System.Text.Json;

namespace Rollout.Client.Tests;

/// <summary>The weights of the golden models.</summary>
internal static class GoldenTensors
{
    public static string Folder(string model)
    {
        for (DirectoryInfo? at = new(AppContext.BaseDirectory); at is not null; at = at.Parent)
        {
            string folder = Path.Combine(at.FullName, "tests", "golden", model);
            if (Directory.Exists(folder))
                return folder;
        }

        throw new DirectoryNotFoundException($"tests/golden/{model}");
    }

    /// <summary>Every tensor, and its bytes, which the source reads at each push.</summary>
    public static List<(TensorSource Source, byte[] Bytes)> Of(string model)
    {
        byte[] file = File.ReadAllBytes(Path.Combine(Folder(model), "model.safetensors"));
        int header = (int)BitConverter.ToInt64(file);
        using JsonDocument json = JsonDocument.Parse(file.AsMemory(8, header));
        List<(TensorSource, byte[])> tensors = [];
        foreach (JsonProperty tensor in json.RootElement.EnumerateObject().Where(entry => entry.Name != "__metadata__"))
        {
            long[] shape = [.. tensor.Value.GetProperty("shape").EnumerateArray().Select(length => length.GetInt64())];
            int[] range = [.. tensor.Value.GetProperty("data_offsets").EnumerateArray().Select(offset => offset.GetInt32())];
            byte[] bytes = file[(8 + header + range[0])..(8 + header + range[1])];
            tensors.Add((TensorSource.FromMemory(tensor.Name, TensorDType.BF16, shape, bytes), bytes));
        }

        return tensors;
    }
}
