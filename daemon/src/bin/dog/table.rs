//! Aligned columns without borders, each as wide as its content.

/// Which side of a column its cells stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Texts.
    Left,
    /// Numbers and sizes.
    Right,
}

/// A table that grows by rows. Widths count characters; cells hold no line breaks.
#[derive(Debug)]
pub struct Table<const N: usize> {
    align: [Align; N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    /// With a heading for each column.
    pub fn new(columns: [(&str, Align); N]) -> Self {
        Self {
            align: columns.map(|(_, align)| align),
            rows: vec![columns.map(|(heading, _)| heading.to_string())],
        }
    }

    /// Names and values, without headings.
    pub fn plain(align: [Align; N]) -> Self {
        Self { align, rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells);
    }

    /// All rows, a line each, two spaces between columns and none at the end of a line.
    pub fn render(&self) -> String {
        let width = |cell: &String| cell.chars().count();
        let mut widths = [0; N];
        for row in &self.rows {
            for (widest, cell) in widths.iter_mut().zip(row) {
                *widest = width(cell).max(*widest);
            }
        }
        let mut text = String::new();
        for row in &self.rows {
            let start = text.len();
            for (column, cell) in row.iter().enumerate() {
                let blanks = " ".repeat(widths[column] - width(cell));
                text.push_str(if column == 0 { "" } else { "  " });
                match self.align[column] {
                    Align::Left => text.extend([cell.as_str(), &blanks]),
                    Align::Right => text.extend([&blanks, cell.as_str()]),
                }
            }
            text.truncate(start + text[start..].trim_end().len());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table =
            Table::new([("NAME", Align::Left), ("SIZE", Align::Right), ("AT", Align::Left)]);
        table.row(["a".into(), "10 GiB".into(), String::new()]);
        table.row(["größer".into(), "1 B".into(), "x".into()]);
        assert_eq!(
            table.render(),
            "NAME      SIZE  AT\n\
             a       10 GiB\n\
             größer     1 B  x\n"
        );
    }

    #[test]
    fn plain_tables_have_no_headings() {
        let mut table = Table::plain([Align::Left, Align::Left]);
        assert_eq!(table.render(), "");
        table.row(["Epoch".into(), "7".into()]);
        table.row(["Id".into(), "abc".into()]);
        assert_eq!(table.render(), "Epoch  7\nId     abc\n");
    }
}
